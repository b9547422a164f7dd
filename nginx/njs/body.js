// What a request's body asks for.
//
// Parsing is what a long body costs: QuickJS looks at each character. Where a string without escapes is most of it, as with a
// picture, that string is taken out by searching for its quotes, which costs next to nothing, and put back into what the rest
// was parsed to.

const LONG_BODY = 16384;     // bytes
const LONG_STRING = 4096;    // bytes
const QUOTES = 200;          // looked at, at most: a body of many short strings is parsed as it is
const PARSED = 1 << 20;      // characters; of a longer body whose strings are short only the model is read

const BRACE = 123;           // {: nearly every JSON body begins so
const QUOTE = 34;
const BACKSLASH = 92;
const TAKEN = '\u0001taken ';   // and its number: what stands for a string that was taken out

// Whether the quote at this place belongs to the string.
function escaped(bytes, at) {
    let from = at;
    while (bytes[from - 1] === BACKSLASH) {
        from--;
    }
    return (at - from) % 2 === 1;
}

// The long strings without escapes of a JSON text, as [from, to] each.
function longStrings(bytes) {
    const found = [];
    let left = QUOTES;
    const quote = (from) => left-- > 0 ? bytes.indexOf(QUOTE, from) : -1;
    let end = -1;
    for (let start = quote(0); start >= 0; start = quote(end + 1)) {
        end = quote(start + 1);
        while (end >= 0 && escaped(bytes, end)) {
            end = quote(end + 1);
        }
        if (end < 0) {
            break;
        }
        if (end - start > LONG_STRING) {
            const escape = bytes.indexOf(BACKSLASH, start);
            if (escape < 0 || escape > end) {
                found.push([start + 1, end]);
            }
        }
    }
    return found;
}

// Parses a JSON text without these strings, and puts them back where prompts have them.
function parseAround(buffer, strings) {
    let text = '';
    let from = 0;
    for (let i = 0; i < strings.length; i++) {
        text += buffer.toString('utf8', from, strings[i][0]) + JSON.stringify(TAKEN + i).slice(1, -1);
        from = strings[i][1];
    }
    const body = JSON.parse(text + buffer.toString('utf8', from));
    const whole = (value) => {
        const at = typeof value === 'string' && value.startsWith(TAKEN) ? strings[Number(value.slice(TAKEN.length))] : undefined;
        return at ? buffer.toString('utf8', at[0], at[1]) : value;
    };
    for (const key of ['prompt', 'input']) {
        body[key] = Array.isArray(body[key]) ? body[key].map(whole) : whole(body[key]);
    }
    for (const message of Array.isArray(body.messages) ? body.messages : []) {
        if (message && Array.isArray(message.content)) {
            for (const part of message.content) {
                if (part && part.image_url) {
                    part.image_url.url = whole(part.image_url.url);
                } else if (part) {
                    part.text = whole(part.text);
                }
            }
        } else if (message) {
            message.content = whole(message.content);
        }
    }
    return body;
}

// Of a text that is too long to be parsed each time: its model, which is near one of the two ends in every client's layout,
// and its beginning as a prompt. Undefined where the model is not found.
function fromTheEnds(text) {
    const field = /^\s*\{\s*"model"\s*:\s*"([^"\\]*)"/.exec(text.slice(0, 512))
        || /,\s*"model"\s*:\s*"([^"\\]*)"\s*(?:,\s*"\w+"\s*:\s*(?:"[^"\\]*"|[\w.+-]+)\s*)*\}\s*$/.exec(text.slice(-512));
    return field ? { model: field[1], prompt: text.slice(0, PARSED / 4) } : undefined;
}

function parseLong(buffer) {
    const strings = longStrings(new Uint8Array(buffer.buffer, buffer.byteOffset, buffer.length));
    if (strings.length) {
        return parseAround(buffer, strings);
    }
    const text = buffer.toString();
    return text.length > PARSED && fromTheEnds(text) || JSON.parse(text);
}

// A body that does not begin as most do: a form that uploads a file, or whatever it is.
function parseOther(r, text) {
    if (!/^multipart\//.test(r.headersIn['Content-Type'])) {
        return JSON.parse(text);
    }
    const field = /name="model"\r\n\r\n([^\r\n]*)/.exec(text);
    return { model: field ? field[1] : '' };
}

// The body of a request as an object: from its text, or from its bytes, which are less work where it is longer than LONG_BODY.
// Of one that is no JSON object nothing is known: the replica says what is wrong.
function parse(r, content) {
    let body = null;
    try {
        if (typeof content === 'string' && content.length <= LONG_BODY) {
            body = content.charCodeAt(0) === BRACE ? JSON.parse(content) : parseOther(r, content);
        } else {
            const buffer = Buffer.from(content);
            body = buffer[0] === BRACE ? parseLong(buffer) : parseOther(r, buffer.toString());
        }
    } catch (e) {
        // not JSON
    }
    return body && typeof body === 'object' ? body : {};
}

export default { LONG_BODY, parse };
