// Where the fields of a JSON object stand, in a body that is too long to be parsed: strings are skipped by native searches,
// and only what lies between them is walked. Whatever Python's json takes is read as it reads it; of two fields of one name the
// last counts. What it refuses, the replica refuses too.

const BLOCK = 2048;   // steps between two looks at the clock
const ESCAPE = 6;     // characters, as in \u006d

// {found, values}: for each of the names, [begin, end] of its value if that is a string, an object, an array or a number; and how
// many of the first three kinds there are, at any depth. Null for what is no whole JSON value.
async function fields(body, names, turn) {
    // The numbers are the characters' own; in a local variable they are read faster.
    const quotes = 34, comma = 44, colon = 58, letters = 91, backslashes = 92;
    const opens = 123, closes = 125;   // the brackets { and }, and with bit 32 set also [ and ]
    const found = Object.create(null);
    const lengths = names.map((name) => name.length);
    const longest = Math.max(...lengths) * ESCAPE;
    let values = 0;
    let depth = 0;
    let rounds = 0;
    let inside = false;      // a string
    let escaped = false;     // it has a backslash
    let began = 0;           // where the outer object's value begins
    let key = '';            // the outer object's last string, a key if a colon follows
    let number = -1;         // where its value begins if that is a number
    let name = null;         // the key whose value is being passed, '' if it is none of the names
    for (let at = 0; at < body.length;) {
        const piece = body.piece(at);
        const length = piece.length;
        let quote = -1;      // the next one, and the next backslash: searched for when they are passed
        let backslash = -1;
        let from = 0;        // the string's begin, 0 if that is in an earlier piece
        let i = 0;
        while (i < length) {
            if ((++rounds & 7) === 0 && turn.over()) {
                await turn.others();
            }
            let left = BLOCK;
            if (inside) {
                for (; left > 0; left--) {
                    if (quote < i) {
                        quote = piece.indexOf(quotes, i);
                        quote = quote < 0 ? length : quote;
                    }
                    if (backslash < i) {
                        backslash = piece.indexOf(backslashes, i);
                        backslash = backslash < 0 ? length : backslash;
                    }
                    if (backslash >= quote) {
                        break;
                    }
                    escaped = true;
                    i = backslash + 2;
                }
                if (left === 0) {
                    continue;
                }
                // It is beyond the end if the last character was a backslash.
                i = i < quote ? quote : i;
                if (i >= length) {
                    break;
                }
                i++;
                inside = false;
                if (depth === 1 && name) {
                    found[name] = [began, at + i];
                } else if (depth === 1 && name === null) {
                    const short = escaped ? quote - from <= longest : lengths.includes(quote - from);
                    key = from && short ? textOf(piece.subarray(from, quote), escaped) : '';
                }
            }
            for (let end = i + left < length ? i + left : length; i < end;) {
                const byte = piece[i++];
                if (byte < letters) {
                    if (byte === quotes) {
                        inside = true;
                        break;
                    }
                    if (depth === 1) {
                        if (byte === colon) {
                            name = names.includes(key) ? key : '';
                            number = -1;
                            if (name) {
                                found[name] = undefined;
                            }
                        } else if (byte === comma) {
                            if (name && number >= 0) {
                                found[name] = [number, at + i - 1];
                            }
                            name = null;
                            key = '';
                        } else if (number < 0 && byte > 32) {
                            number = at + i - 1;
                        }
                    }
                } else if ((byte | 32) === opens) {
                    if (depth++ === 1) {
                        began = at + i - 1;
                    }
                    values++;
                } else if ((byte | 32) === closes) {
                    depth--;
                    if (depth === 1 && name) {
                        found[name] = [began, at + i];
                    } else if (depth === 0 && name && number >= 0) {
                        found[name] = [number, at + i - 1];
                    }
                }
            }
            if (inside) {
                escaped = false;
                from = i;
                values++;
                if (depth === 1) {
                    began = at + i - 1;
                }
            }
        }
        if (inside && depth === 1 && name === null && from > 1) {
            // A key must lie in one piece.
            inside = false;
            i = from - 1;
        }
        at += i;
    }
    return depth === 0 && !inside ? { found, values } : null;
}

function textOf(bytes, escaped) {
    const text = String.fromCharCode.apply(null, bytes);
    try {
        return escaped ? JSON.parse(`"${text}"`) : text;
    } catch (e) {
        return '';
    }
}

export default { fields };
