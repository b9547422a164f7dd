// Which replica has a prompt's beginning in its cache.
//
// A prompt is cut where another one is likely to part from it: after each of its first messages (a shared system prompt),
// after each of its last ones (the same conversation, grown), and within these at 1024, 2048, 4096 … characters (a document
// with another question). The key of a cut is a hash of all that comes before it, so equal keys mean equal beginnings. The
// dictionary `prefixes` remembers for each key which replicas were sent it lately.
//
// Of a long message only its length and samples are hashed: its first characters, and the last ones before each cut. A wrong
// match costs one cache miss, hashing every byte would cost every request.
//
// Every request runs through here, and QuickJS takes its time: loops over characters and objects made in passing are dear,
// cutting and joining strings is not.

import crypto from 'crypto';
import texts from './texts.js';

const prefixes = ngx.shared.prefixes;

const FIRST_CUT = texts.FIRST_CUT;   // characters: some sixteen blocks of a replica's cache; a message up to this length is hashed whole
const SAMPLE = 64;       // characters
const SHORTEST = 192;    // characters: no stand-in is as short
const MUCH = 1000;       // characters of what is hashed; beyond these its hash goes on in its place, and that of a longer first message
const PARTS = 32;        // of a message that are pieces of their own
const CUTS = 100;        // of a prompt that lie within pieces
const MESSAGES = 1000;   // of a prompt; what follows them is not cut
const LOOK_BACK = 6;     // messages: a turn adds two, a turn with tools some more
const HOLDERS = 6;       // replicas remembered a key, eight bits each

// What a cut is.
const KEPT = 1;   // worth remembering; the others are only looked up
const OWN = 2;    // a match here is the same conversation: its first answer follows

// What a message says, in pieces: images, sounds and tool results by their data.
function piecesOf(message) {
    const content = message.content;
    const calls = message.tool_calls;
    const pieces = calls ? [JSON.stringify(calls)] : [];
    if (typeof content === 'string') {
        pieces.unshift(content);
    } else if (Array.isArray(content)) {
        for (const part of content.slice(0, PARTS)) {
            const said = part && part.text;
            pieces.push(typeof said === 'string' ? said : hash(JSON.stringify(part) || ''), '\n');
        }
        if (content.length > PARTS) {
            pieces.push(JSON.stringify(content.slice(PARTS)));
        }
    } else if (!calls) {
        pieces.push(JSON.stringify(message));
    }
    return pieces;
}

// What is rendered before the first message, in pieces.
function frontOf(body) {
    const pieces = [];
    for (const name of ['cache_salt', 'tools', 'system', 'instructions']) {
        const part = body[name];
        if (part) {
            pieces.push(`\n${name}\n`, typeof part === 'string' ? part : JSON.stringify(part));
        }
    }
    return pieces;
}

function growAll(prompt, text, pieces, early) {
    for (const piece of pieces) {
        text = grow(prompt, text, piece, early, true);
    }
    return text;
}

// `text`, and after it a piece of the prompt, which is cut if `early`. `mixed`: stand-ins may be within.
function grow(prompt, text, said, early, mixed) {
    const before = prompt.length;
    if (said.length <= SHORTEST) {
        prompt.length = before + said.length;
        return text + said;
    }
    const long = texts.isStandIn(said);
    const length = long ? texts.standsFor(said) : mixed ? texts.lengthOf(said) : said.length;
    const short = length === said.length;
    prompt.length = before + length;
    // Where stand-ins are within, its length does not tell where to cut it.
    if (length <= FIRST_CUT || !short && !long) {
        return text + said;
    }
    const { cuts, texts: found } = prompt;
    let all = text + (short ? said.slice(0, SAMPLE) : '');
    for (let to = FIRST_CUT, n = 1; to < length; to *= 2, n++) {
        if (short) {
            all += said.slice(to - SAMPLE, to);
        }
        if (early && cuts.length < CUTS) {
            cuts.push((before + to) * 4 + KEPT);
            found.push(short ? all : all + texts.upTo(said, n));
        }
    }
    return short ? all + said.slice(length - SAMPLE) + length : all + said;
}

// The cuts of a request's body, from the start of its prompt to the end, or null where it has no prompt that is cached:
// {length, cuts, texts, keys, holders, at, more, first}. A cut is the length of all that comes before it, times four, plus what it
// is; its text is what its key is made of; `more` is what a batch's other prompts add, `first` the cut after the first message, both
// of them only if they are not 0. Keys, holders and `at` are filled when a replica is chosen: the keys and holders that were looked
// up, and which cut matched.
function cutsOf(body, model) {
    const messages = messagesOf(body);
    const said = messages ? '' : promptOf(body);
    if (!messages && !said) {
        return null;
    }
    const cuts = [];
    const found = [];
    const prompt = { length: 0, cuts, texts: found, keys: [], holders: [], at: -1 };
    let text = model;
    if (body.tools || body.system || body.instructions || body.cache_salt) {
        text = growAll(prompt, text, frontOf(body), true);
        cuts.push(prompt.length * 4 + KEPT);
        found.push(text);
        if (text.length > MUCH) {
            text = key(prompt, cuts.length - 1);
        }
    }
    if (!messages) {
        found.push(grow(prompt, text, said, true, said[0] === '['));
        cuts.push(prompt.length * 4 + KEPT + OWN);
        prompt.more = moreOf(body.prompt || body.input);
        return prompt;
    }
    const last = Math.min(messages.length, MESSAGES) - 1;
    let own = 0;
    for (let i = 0; i <= last; i++) {
        const message = messages[i];
        if (!message) {
            continue;
        }
        const role = message.role;
        const content = message.content;
        const early = i < 2 || i === last;
        if (!own && (role === 'assistant' || i < last && messages[i + 1] && messages[i + 1].role === 'assistant')) {
            own = OWN;
        }
        text = typeof role === 'string' ? `${text}\0${role}\0` : text + '\0\0';
        text = typeof content === 'string' && !message.tool_calls ? grow(prompt, text, content, early)
            : growAll(prompt, text, piecesOf(message), early);
        prompt.length++;
        const cut = early || i >= last - LOOK_BACK;
        if (cut) {
            cuts.push(prompt.length * 4 + own + (early ? KEPT : 0));
            found.push(text);
            if (!i && cuts.length > 1) {
                prompt.first = cuts.length - 1;
            }
        }
        if (text.length > (i ? MUCH : SHORTEST)) {
            text = cut ? key(prompt, cuts.length - 1) : hash(text);
        }
    }
    return cuts.length ? prompt : null;
}

// The messages of a chat, which the Responses API calls its input; undefined where the prompt is none.
function messagesOf(body) {
    const input = body.input;
    return Array.isArray(body.messages) ? body.messages
        : Array.isArray(input) && input[0] && typeof input[0] === 'object' && !Array.isArray(input[0]) ? input : undefined;
}

// Characters of a batch's prompts but for the first.
function moreOf(batch) {
    let sum = 0;
    if (Array.isArray(batch) && typeof batch[0] !== 'number') {
        for (let i = 1; i < batch.length; i++) {
            // only these have a length that is theirs, and not the client's to say
            sum += typeof batch[i] === 'string' ? texts.lengthOf(batch[i]) : Array.isArray(batch[i]) ? 4 * batch[i].length : 0;
        }
    }
    return sum;
}

// The prompt of a body that has no messages, or ''. Of several prompts the first, of token numbers the first 4096.
function promptOf(body) {
    const prompt = body.prompt || body.input;
    if (Array.isArray(prompt) && prompt.length) {
        return typeof prompt[0] === 'string' ? prompt[0] : JSON.stringify(prompt.slice(0, 4096));
    }
    return typeof prompt === 'string' ? prompt : '';
}

const md5 = crypto.createHash('md5');   // to copy it costs half as much as to make one

function hash(text) {
    return md5.copy().update(text).digest('base64');
}

// The key of the i-th cut.
function key(prompt, i) {
    return prompt.keys[i] || (prompt.keys[i] = hash(prompt.texts[i]));
}

// What says where a prompt is at home, a whole number: its first message where nothing of it is known, else the beginning of its
// conversation, or of its first turn all of it.
function beginning(prompt) {
    const own = prompt.cuts.findIndex((cut) => cut & OWN);
    return number(key(prompt, prompt.at < 0 ? prompt.first || 0 : own < 0 ? prompt.cuts.length - 1 : own));
}

// 32 bits of a hash.
function number(text) {
    return parseInt(md5.copy().update(text).digest('hex').slice(0, 8), 16);
}

// Between 0 and 1: what this beginning draws for this replica, by its name. The last steps of MurmurHash3 mix them.
function draw(beginning, replica) {
    if (replica.seed === undefined) {
        replica.seed = number(replica.name);
    }
    let mixed = beginning ^ replica.seed;
    mixed = Math.imul(mixed ^ mixed >>> 16, 0x85ebca6b);
    mixed = Math.imul(mixed ^ mixed >>> 13, 0xc2b2ae35);
    return (((mixed ^ mixed >>> 16) >>> 0) + 0.5) / 2 ** 32;
}

// The ids of the replicas that were sent this key, the latest first, packed into a number; 0 for none.
function holders(of) {
    return prefixes.get(of) || 0;
}

// The same of the i-th cut, asked once.
function holdersAt(prompt, i) {
    const known = prompt.holders[i];
    return known === undefined ? prompt.holders[i] = prefixes.get(key(prompt, i)) || 0 : known;
}

// Remembers that the replica `id` was sent the prompt up to its i-th cut.
function keepAt(prompt, i, id) {
    keep(key(prompt, i), id, holdersAt(prompt, i));
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
    if (!packed || packed === id) {
        prefixes.set(of, id);
        return;
    }
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

export default { KEPT, OWN, cutsOf, hash, key, holders, holdersAt, holds, keep, keepAt, beginning, draw };
