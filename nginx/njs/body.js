// What a request asks for, read out of its body.
//
// Parsing makes an object of every value: a body of many small ones would hold the worker for seconds. So a long body is
// looked through first, where strings are skipped by native searches and only what lies between them is walked, and other
// requests have their turn in between. It is parsed where that is cheap; else its fields are taken from where they stand.

const SHORT = 1 << 17;       // bytes: parsed whatever is in it
const PARSED = 1 << 20;      // bytes: parsed if there is little between its strings …
const STEPS = 1 << 15;       // … so many steps of the walk at most
const TURN = 1 << 12;        // steps between two turns of the others
const MOST = 1 << 22;        // steps, at most: what stands behind them is looked for at the body's end
const BEGINNING = 1 << 18;   // bytes of a long body's prompt that are taken for its beginning
const NAME = 4096;           // bytes, at most, of a model's name or a session's key in a long body
const WINDOW = 1 << 20;      // bytes searched between two turns of the others
const PART = 2048;           // bytes, at most, of an upload's field with its headers
const PARTS = 256;           // parts read between two turns of the others

const QUOTE = 34;
const BACKSLASH = 92;
const [COMMA, COLON, OPEN, CLOSE, BEGIN, END] = [44, 58, 123, 125, 91, 93];

const PROMPTS = ['tools', 'system', 'instructions', 'messages', 'prompt', 'input'];   // in the order of the rendered prompt
const FIELDS = new Set(['model', 'prompt_cache_key'].concat(PROMPTS));

// {model, body, session}: the model's name or '', what prefix.js cuts, and what the session is called. Bodies that are no
// JSON object give no model: the replica says what is wrong.
async function read(r) {
    const headers = r.headersIn;
    const type = headers['Content-Type'] || '';
    let body = {};
    if (type !== 'application/json' && /^\s*multipart\//i.test(type)) {
        body = await upload(await bytesOf(r), type);
    } else if (headers['Content-Length'] <= SHORT) {
        const text = await r.readRequestText() || '';
        body = parse(text) || text.slice(0, 4).includes('\0') && parse(utf16(await bytesOf(r))) || body;
    } else {
        let bytes = await bytesOf(r);
        if (bytes.length <= PARSED && (bytes[0] === 0 || bytes[1] === 0 || bytes[0] >= 0xFE)) {
            bytes = new Uint8Array(Buffer.from(utf16(bytes)));
        }
        body = bytes.length <= SHORT ? parse(String(Buffer.from(bytes))) || body : await scan(bytes);
    }
    const session = headers['X-Session-Id'] || headers['X-Claude-Code-Session-Id'] || headers['Session-Id']   // Codex
        || headers['X-OpenWebUI-Chat-Id'] || (typeof body.prompt_cache_key === 'string' ? body.prompt_cache_key : '');
    const uri = r.uri;
    // To count tokens is no work, and needs no cache.
    const counts = uri.endsWith('tokenize') || uri.endsWith('/count_tokens');
    return { model: typeof body.model === 'string' ? body.model : '', body: counts ? {} : body, session };
}

async function bytesOf(r) {
    return new Uint8Array(await r.readRequestArrayBuffer() || 0);
}

// The object that a text holds, or null. Some clients begin it with a byte order mark.
function parse(text) {
    try {
        const value = JSON.parse(text.charCodeAt(0) === 0xFEFF ? text.slice(1) : text);
        return value && typeof value === 'object' ? value : null;
    } catch (e) {
        return null;
    }
}

// The text of bytes in UTF-16, of either order.
function utf16(bytes) {
    const big = bytes[0] === 0xFE || bytes[0] === 0;
    const even = bytes.slice(0, bytes.length & ~1);
    const units = new Uint16Array((big ? Buffer.from(even.buffer).swap16() : even).buffer);
    let text = '';
    for (let at = 0; at < units.length; at += 4096) {
        text += String.fromCharCode.apply(null, units.subarray(at, at + 4096));
    }
    return text;
}

// Lets other requests have their turn: without a millisecond the timer would fire before they do.
function others() {
    return new Promise((resolve) => setTimeout(resolve, 1));
}

function textOf(bytes, from, to) {
    return String(Buffer.from(bytes.slice(from, to)));
}

// Where the byte is next, or where the search ended without it.
function next(bytes, byte, from) {
    const piece = bytes.subarray(from, from + WINDOW);
    const at = piece.indexOf(byte);
    return from + (at < 0 ? piece.length : at);
}

// The fields of a long body: parsed, or the model, the session's key and the prompt's beginning.
async function scan(bytes) {
    const found = Object.create(null);   // a field's name: where its value begins and ends
    const length = bytes.length;
    let steps = 0;
    let depth = 0;
    let inside = false;      // a string
    let quote = -1;          // the next one, and the next backslash: searched for when they are passed
    let backslash = -1;
    let from = 0;            // the string's begin
    let key = '';            // the outer object's last string, a key if a colon follows
    let name = null;         // the key whose value is being passed
    let value = 0;           // its begin
    for (let i = 0; i < length && steps < MOST;) {
        if (++steps % TURN === 0) {
            await others();
        }
        if (inside) {
            if (quote <= i) {
                quote = next(bytes, QUOTE, i);
            }
            if (backslash <= i) {
                backslash = next(bytes, BACKSLASH, i);
            }
            if (backslash < quote && bytes[backslash] === BACKSLASH) {
                i = backslash + 2;
                continue;
            }
            if (bytes[quote] !== QUOTE) {
                i = backslash < quote ? backslash : quote;
                await others();
                continue;
            }
            if (backslash < quote) {
                i = backslash;
                continue;
            }
            inside = false;
            i = quote + 1;
            if (depth === 1 && name === null) {
                key = quote - from > NAME ? '' : textOf(bytes, from - 1, i);
            }
            continue;
        }
        const byte = bytes[i++];
        if (byte < QUOTE) {
            continue;
        }
        if (byte === QUOTE) {
            inside = true;
            from = i;
        } else if (byte === OPEN || byte === BEGIN) {
            depth++;
        } else if (depth > 1 && byte < BEGIN) {
            continue;
        } else if (depth === 1 && byte === COLON) {
            name = parse(`[${key}]`);
            name = name ? name[0] : '';
            value = i;
        } else if (byte === COMMA || byte === CLOSE || byte === END) {
            if (depth === 1 && name !== null) {
                if (FIELDS.has(name)) {
                    found[name] = [value, i - 1];
                }
                name = null;
            }
            if (byte !== COMMA) {
                depth--;
            }
        }
    }
    if (length <= PARSED && steps <= STEPS) {
        return parse(textOf(bytes, 0, length)) || {};
    }
    const body = {};
    const tail = steps < MOST ? '' : textOf(bytes, length - NAME, length);
    for (const field of ['model', 'prompt_cache_key']) {
        const last = tail.lastIndexOf(`"${field}"`);
        if (last >= 0) {
            const [, text] = /^\s*:\s*("(?:[^"\\]|\\.)*")/.exec(tail.slice(last + field.length + 2)) || [];
            body[field] = (parse(`[${text}]`) || [])[0];
            continue;
        }
        const [begin, end] = found[field] || [0, 0];
        if (end - begin <= NAME) {
            body[field] = (parse(`[${textOf(bytes, begin, end)}]`) || [])[0];
        }
    }
    let left = BEGINNING;
    body.prompt = '';
    for (const field of PROMPTS) {
        const [begin, end] = found[field] || [0, 0];
        const to = Math.min(end, begin + left);
        left -= to - begin;
        body.prompt += textOf(bytes, begin, to);
    }
    return body;
}

// The fields of an upload: its model.
async function upload(bytes, type) {
    const [, quoted, plain] = /;\s*boundary=(?:"([^"]+)"|([^;\s]+))/i.exec(type) || [];
    const boundary = `--${quoted || plain}`;
    const buffer = Buffer.from(bytes.buffer);
    const body = {};
    let parts = 0;
    for (let from = 0; from < buffer.length; from += WINDOW) {
        await others();
        // A part may begin where the window ends.
        const piece = buffer.subarray(from, from + WINDOW + PART);
        for (let at = piece.indexOf(boundary); at >= 0 && at < WINDOW; at = piece.indexOf(boundary, at + 1)) {
            if (++parts % PARTS === 0) {
                await others();
            }
            const field = /^\r\n(?:.+\r\n)*?content-disposition:(.*)\r\n(?:.+\r\n)*\r\n([^\r\n]*)\r\n--/i.exec(
                String(piece.subarray(at + boundary.length, at + boundary.length + PART)));
            if (field && nameOf(field[1]) === 'model') {
                body.model = field[2];
            }
        }
    }
    return body;
}

// The name that a part's Content-Disposition gives it.
function nameOf(disposition) {
    for (const [, key, quoted, plain] of disposition.matchAll(/;\s*([\w*]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^;]*))/g)) {
        if (key.toLowerCase() === 'name') {
            return quoted === undefined ? plain.trim() : quoted;
        }
    }
    return '';
}

export default { read };
