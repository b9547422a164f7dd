// The model that a multipart upload names, read as the replica's python-multipart reads it. Where that would be a guess, the
// upload is refused: what the gateway goes by must be what the replica goes by.

const WINDOW = 1 << 16;   // bytes searched at a time
const PARTS = 2000;       // at most: the replica takes a thousand fields and a thousand files
const HEAD = 4096;        // bytes, at most, of a part's headers
const TYPE = 1024;        // characters, at most, of the upload's Content-Type
const VALUE = 4096;       // bytes, at most, of a field's value
const FIELDS = ['model', 'stream_include_usage', 'stream_continuous_usage_stats', 'max_completion_tokens', 'n'];

const TOKEN = "[!#$%&'*+.^_`|~0-9A-Za-z-]+";
const QUOTED = String.raw`"(?:[^"\\]|\\"|\\(?!"))*"`;
const PARAMETER = new RegExp(String.raw`;[ \t]*(${TOKEN})=(${QUOTED}|[^\s;"\\<>]+)[ \t]*`, 'g');
const PARAMETERS = new RegExp(String.raw`^[ \t]*${TOKEN}(?:/${TOKEN})?[ \t]*(?:${PARAMETER.source})*(?:;[ \t]*)?$`);
const HEADER = new RegExp(`^(${TOKEN}):(.*)$`);

// The parameters of a header's value by name, in lower case; null if they can be read in more than one way.
function parameters(value) {
    if (!PARAMETERS.test(value)) {
        return null;
    }
    const found = Object.create(null);
    for (const [, key, text] of value.matchAll(PARAMETER)) {
        const name = key.toLowerCase();
        // RFC 2231 has other ways to write a value, name*=…, which some versions read; of these .NET uses one, for the file.
        if (name in found || name.includes('*') && name !== 'filename*') {
            return null;
        }
        found[name] = text[0] === '"' ? text.slice(1, -1) : text;
    }
    return found;
}

// The parameters of a part's Content-Disposition, from the lines of its head; null if they can't be relied on.
function disposition(lines) {
    let found = null;
    for (const line of lines) {
        const [, name, value] = HEADER.exec(line) || [];
        if (name === undefined || name.toLowerCase() === 'content-disposition' && found) {
            return null;
        }
        if (name.toLowerCase() === 'content-disposition') {
            found = parameters(value);
            if (!found) {
                return null;
            }
        }
    }
    return found;
}

// {model and other FIELDS}, or {unreadable: why} where the replica might read something else.
async function fields(body, type, turn) {
    const given = type.length <= TYPE ? parameters(type) : null;
    const boundary = given && given.boundary;
    if (!boundary || !/^[\x21-\x7E ]{1,200}$/.test(boundary) || !/^(utf-?8|us-ascii)$/i.test(given.charset || 'utf-8')) {
        return { unreadable: 'its Content-Type' };
    }
    const delimiter = `\r\n--${boundary}`;
    const text = (from, length) => String(Buffer.from(body.bytes(from, from + length)));
    const start = text(0, delimiter.length + 2);
    const blank = /^(\r\n){0,2}/.exec(start)[0].length;
    if (!text(blank, delimiter.length).startsWith(delimiter.slice(2))) {
        return /^[\r\n]/.test(start) ? { unreadable: 'what comes before its first part' } : {};
    }
    const found = {};
    let at = blank + delimiter.length - 2;
    for (let parts = 0; text(at, 2) === '\r\n'; parts++) {
        if (parts === PARTS) {
            return { unreadable: `its more than ${PARTS} parts` };
        }
        // Counted in bytes: what is no UTF-8 has another length as text.
        const end = Buffer.from(body.bytes(at + 2, at + 2 + HEAD)).indexOf('\r\n\r\n');
        const named = end < 0 ? null : disposition(text(at + 2, end).split('\r\n'));
        if (!named) {
            return { unreadable: 'the headers of a part' };
        }
        // The line end before a boundary belongs to it, and must not be that of the headers.
        const begin = at + 2 + end + 4;
        at = await next(body, delimiter, begin, turn);
        if (at < 0) {
            break;
        }
        const name = named.name;
        if (FIELDS.includes(name) && named.filename === undefined) {
            found[name] = at - begin <= VALUE ? text(begin, at - begin) : '';
            if (named['filename*'] !== undefined || found[name].includes('\uFFFD')) {
                return { unreadable: `how it writes ${name}` };
            }
        } else if (FIELDS.includes(name)) {
            found[name] = '';
        }
        at += delimiter.length;
        if (/[ \t]/.test(text(at, 1))) {
            return { unreadable: 'blanks after a boundary' };
        }
    }
    return found;
}

// Where the part ends that begins here, or -1: a boundary that anything else follows is data.
async function next(body, delimiter, from, turn) {
    for (let at = from; ; at += WINDOW) {
        if (turn.over()) {
            await turn.others();
        }
        // A boundary may begin where the window ends.
        const bytes = Buffer.from(body.bytes(at, at + WINDOW + delimiter.length + 1));
        for (let i = bytes.indexOf(delimiter); i >= 0 && i < WINDOW; i = bytes.indexOf(delimiter, i + 1)) {
            const after = String(bytes.subarray(i + delimiter.length, i + delimiter.length + 2));
            if (after === '\r\n' || after === '--' || /^[ \t]/.test(after)) {
                return at + i;
            }
            if (turn.over()) {
                await turn.others();
            }
        }
        if (bytes.length <= WINDOW) {
            return -1;
        }
    }
}

export default { fields };
