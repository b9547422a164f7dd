// Long texts of a body: to read one character by character costs more than all else that is done with a request. So they are cut
// out before the body is parsed, and a stand-in takes the place of each: what prefix.js hashes of it, and its length.
//
// A stand-in is the mark, samples of SAMPLE bytes in base64 (the first, those before each cut of prefix.js, and the last), a dot
// and the length in bytes. The mark is secret, as nobody else may write stand-ins.

const shared = ngx.shared.fleet;

// Bytes: texts beyond these are cut out; the next cut is at twice as many, and so on. A shorter text is parsed for less than it
// costs to cut it out.
const FIRST_CUT = 1024;
const SAMPLE = 48;         // bytes
const WIDTH = 64;          // characters of a sample
const MARK = 23;           // characters of the mark
const DIGITS = 9;          // of a length
const FEW = 64;            // escaped quotes that are looked at in any body …
const SPARSE = 96;         // … and one more for so many bytes before them: where there are more, parsing costs less
const BLANKS = 64;         // blanks, at most, between a text's end and what follows
const QUOTE = 34;
const [BLANK, COMMA, COLON, BACKSLASH, BRACKET, BRACE] = [32, 44, 58, 92, 93, 125];

// To make a Buffer of the bytes would cost as much as to parse 400 characters.
const decode = Buffer.prototype.toString;

let secret = '';
let made = 0;   // stand-ins in the last body, which is looked at before another one is read

function mark() {
    if (!secret) {
        const random = Buffer.from(crypto.getRandomValues(new Uint8Array(16))).toString('base64url');
        shared.add('mark', `~${random}`);
        secret = shared.get('mark');
    }
    return secret;
}

// The text of a JSON body whose long texts are stand-ins. What is no JSON stays none, but for what is wrong within such a text.
//
// It goes from quote to quote in strides: what begins and ends within one is no long text. An escaped quote is in a text, from the
// quote before that is not escaped to the one after. Any other begins a text, unless what follows says that it ends one. What is
// none and is taken for a text stands outside of all texts, where a stand-in makes it no JSON.
function shortened(bytes) {
    let text = '';
    let kept = 0;
    let steps = 0;
    made = 0;
    for (let at = bytes.indexOf(QUOTE); at >= 0;) {
        let open = at;
        let close = bytes.indexOf(QUOTE, at + 1);
        if (close > 0 && close - at <= FIRST_CUT + 1) {
            close = bytes.lastIndexOf(QUOTE, at + FIRST_CUT + 1);
            if (bytes[close - 1] !== BACKSLASH || !isEscaped(bytes, close)) {
                at = close;
                continue;
            }
            open = close;
        }
        const most = FEW + at / SPARSE;
        for (; bytes[open - 1] === BACKSLASH && isEscaped(bytes, open) && steps < most; steps++) {
            open = bytes.lastIndexOf(QUOTE, open - 1);
        }
        for (; bytes[close - 1] === BACKSLASH && isEscaped(bytes, close) && steps < most; steps++) {
            close = bytes.indexOf(QUOTE, close + 1);
        }
        if (close < 0 || steps >= most) {
            break;
        }
        if (close - open > FIRST_CUT + 1 && begins(bytes, open)) {
            text += decode.call(bytes, 'utf8', kept, open + 1) + standIn(bytes, open + 1, close);
            kept = close;
            made++;
        }
        at = close;
    }
    return text + decode.call(bytes, 'utf8', kept, bytes.length);
}

// Whether a text begins with this quote, as far as what follows tells: after its end comes one of these four.
function begins(bytes, quote) {
    let at = quote + 1;
    while (bytes[at] <= BLANK && at < quote + BLANKS) {
        at++;
    }
    const next = bytes[at];
    return next !== COMMA && next !== COLON && next !== BRACKET && next !== BRACE;
}

// Whether an odd number of backslashes stands before this byte.
function isEscaped(bytes, at) {
    let from = at;
    while (bytes[from - 1] === BACKSLASH) {
        from--;
    }
    return (at - from) % 2 === 1;
}

function standIn(bytes, begin, end) {
    const length = end - begin;
    let text = mark() + decode.call(bytes, 'base64', begin, begin + SAMPLE);
    for (let to = FIRST_CUT; to < length; to *= 2) {
        text += decode.call(bytes, 'base64', begin + to - SAMPLE, begin + to);
    }
    return text + decode.call(bytes, 'base64', end - SAMPLE, end) + '.' + length;
}

// Searches in a text are dear, cutting it is not.
function isStandIn(text) {
    return text.length > 3 * WIDTH && text.slice(0, MARK) === mark();
}

// The length of what a stand-in stands for.
function standsFor(standIn) {
    return Number(standIn.slice(standIn.lastIndexOf('.') + 1));
}

// The length of a text with that of what its stand-ins stand for.
function lengthOf(text) {
    let length = text.length;
    for (let at = made ? text.indexOf(mark()) : -1; at >= 0; at = text.indexOf(mark(), at + MARK)) {
        const dot = text.indexOf('.', at) + 1;
        const digits = /^\d+/.exec(text.slice(dot, dot + DIGITS))[0];
        length += Number(digits) - (dot + digits.length - at);
    }
    return length;
}

// What a stand-in says of the text up to its n-th cut, from 1 on.
function upTo(standIn, n) {
    return standIn.slice(0, MARK + WIDTH * (n + 1));
}

export default { FIRST_CUT, shortened, isStandIn, standsFor, lengthOf, upTo };
