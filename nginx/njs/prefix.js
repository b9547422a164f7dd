// Which replica has a prompt's beginning in its cache.
//
// A prompt is cut where another one is likely to part from it: after each of its first messages (a shared system prompt),
// after each of its last ones (the same conversation, grown), and within these at 512, 1024, 2048 … characters (a document
// with another question). The key of a cut is a hash of all that comes before it, so equal keys mean equal beginnings. The
// dictionary `prefixes` remembers for each key which replicas were sent it lately.
//
// Of a long message only the length, the first and the last characters of each piece between two cuts are hashed: a wrong
// match costs one cache miss, hashing every byte would cost every request.

import crypto from 'crypto';

const prefixes = ngx.shared.prefixes;

const FIRST_CUT = 512;   // characters; half a kilobyte is some eight blocks of a replica's cache
const WHOLE = 1024;      // characters; a message up to this length is hashed whole
const SAMPLE = 64;       // characters, at each end of a piece
const LOOK_BACK = 6;     // messages: a turn adds two, a turn with tools some more
const HOLDERS = 6;       // replicas remembered a key, eight bits each

// What a cut is, in the lowest bits of its place.
const KEPT = 1;   // worth remembering; the others are only looked up
const OWN = 2;    // a match here is the same conversation: its first answer follows

function sample(text) {
    return text.length <= 2 * SAMPLE ? text : text.length + text.slice(0, SAMPLE) + text.slice(-SAMPLE);
}

// What a message says, as one string.
function contentOf(message) {
    const content = message.content;
    if (typeof content === 'string') {
        return content;
    }
    if (!Array.isArray(content)) {
        return message.tool_calls ? JSON.stringify(message.tool_calls) : '';
    }
    let text = '';
    for (const part of content) {
        text += sample(String(part && (part.text || part.image_url && part.image_url.url) || '')) + '\n';
    }
    return text;
}

// Cuts a prompt: {text, cuts, lengths}. Each cut is how much of `text` comes before it, times four, plus what it is; its
// length is that of all messages before it, of which `text` has but samples. `answered` is the index of the first answer.
function cut(seed, messages, answered) {
    const cuts = [];
    const lengths = [];
    const last = messages.length - 1;
    let text = seed;
    let before = 0;
    for (let i = 0; i <= last; i++) {
        const message = messages[i];
        const length = message.length;
        const early = i < 2 || i === last;
        if (length <= WHOLE) {
            if (early && length > FIRST_CUT) {
                cuts.push((text.length + FIRST_CUT) * 4 + KEPT);
                lengths.push(before + FIRST_CUT);
            }
            text += message;
        } else {
            let from = 0;
            for (let to = FIRST_CUT; to < length; to *= 2) {
                text += sample(message.slice(from, to));
                from = to;
                if (early) {
                    cuts.push(text.length * 4 + KEPT);
                    lengths.push(before + to);
                }
            }
            text += sample(message.slice(from));
        }
        before += length;
        if (early || i >= last - LOOK_BACK) {
            cuts.push(text.length * 4 + (early ? KEPT : 0) + (i >= answered - 1 ? OWN : 0));
            lengths.push(before);
        }
    }
    return { text, cuts, lengths };
}

// The cuts of a request's body, or null where it has no prompt that is cached.
function cutsOf(body, model) {
    if (Array.isArray(body.messages)) {
        const texts = [];
        let answered = Infinity;
        for (const message of body.messages) {
            if (message) {
                if (message.role === 'assistant' && answered > texts.length) {
                    answered = texts.length;
                }
                texts.push(`\n${message.role}\n${contentOf(message)}`);
            }
        }
        return texts.length ? cut(model, texts, answered) : null;
    }
    const prompt = body.prompt || body.input;
    if (typeof prompt === 'string') {
        return cut(model, [prompt], 1);
    }
    if (Array.isArray(prompt) && prompt.length) {
        // Several prompts, or one as token numbers.
        return cut(model, [typeof prompt[0] === 'string' ? prompt[0] : JSON.stringify(prompt.slice(0, 4096))], 1);
    }
    return null;
}

// The key of the i-th cut.
function key(prompt, i) {
    return crypto.createHash('md5').update(prompt.text.slice(0, prompt.cuts[i] >> 2)).digest('base64');
}

// The ids of the replicas that were sent this key, the latest first, packed into a number; 0 for none.
function holders(of) {
    return prefixes.get(of) || 0;
}

// Whether the packed ids have this one.
function holds(packed, id) {
    for (; packed; packed = Math.floor(packed / 256)) {
        if (packed % 256 === id) {
            return true;
        }
    }
    return false;
}

// Remembers that the replica `id` was sent this key.
function keep(of, id, packed) {
    let now = id;
    let factor = 256;
    for (let n = 1; packed && n < HOLDERS; packed = Math.floor(packed / 256)) {
        if (packed % 256 !== id) {
            now += packed % 256 * factor;
            factor *= 256;
            n++;
        }
    }
    prefixes.set(of, now);
}

export default { KEPT, OWN, cutsOf, key, holders, holds, keep };
