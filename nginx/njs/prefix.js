// Which replica has a prompt's beginning in its cache.
//
// A prompt is cut where another one is likely to part from it: after each of its first messages (a shared system prompt),
// after each of its last ones (the same conversation, grown), and within these at 512, 1024, 2048 … characters (a document
// with another question). The key of a cut is a hash of all that comes before it, so equal keys mean equal beginnings. The
// dictionary `prefixes` remembers for each key which replicas were sent it lately.
//
// Of a long message only the length, the first and the last characters of each piece between two cuts are hashed: a wrong
// match costs one cache miss, hashing every byte would cost every request.
//
// Every request runs through here, and QuickJS takes its time: loops over characters and objects made in passing are dear,
// cutting and joining strings is not.

import crypto from 'crypto';

const prefixes = ngx.shared.prefixes;

const FIRST_CUT = 512;   // characters: some eight blocks of a replica's cache; a message up to this length is hashed whole
const SAMPLE = 64;       // characters, at each end of a piece
const PARTS = 32;        // of a message that are told apart by all of their data
const LOOK_BACK = 6;     // messages: a turn adds two, a turn with tools some more
const HOLDERS = 6;       // replicas remembered a key, eight bits each

// What a cut is.
const KEPT = 1;   // worth remembering; the others are only looked up
const OWN = 2;    // a match here is the same conversation: its first answer follows

// What stands for a part of a text. It takes little of a long one, as cutting strings is cheap and copying them is not.
function sample(text, from, to) {
    return to - from <= 2 * SAMPLE ? text.slice(from, to)
        : (to - from) + text.slice(from, from + SAMPLE) + text.slice(to - SAMPLE, to);
}

// What a message says, as one string: images, sounds and tool results by all of their data.
function contentOf(message) {
    const content = message.content;
    const calls = message.tool_calls ? JSON.stringify(message.tool_calls) : '';
    if (typeof content === 'string') {
        return calls ? content + calls : content;
    }
    if (!Array.isArray(content)) {
        return calls || JSON.stringify(message);
    }
    let text = calls;
    for (const part of content.slice(0, PARTS)) {
        const said = part && part.text;
        text += (typeof said === 'string' ? sample(said, 0, said.length) : hash(JSON.stringify(part) || '')) + '\n';
    }
    if (content.length > PARTS) {
        const rest = JSON.stringify(content.slice(PARTS));
        text += sample(rest, 0, rest.length);
    }
    return text;
}

// What is rendered before the first message, or ''.
function frontOf(body) {
    let text = '';
    for (const name of ['cache_salt', 'tools', 'system', 'instructions']) {
        const part = body[name];
        if (part) {
            text += `\n${name}\n${typeof part === 'string' ? part : JSON.stringify(part)}`;
        }
    }
    return text;
}

// `text`, and after it what a message says; `before` is the length of the messages before it.
function grow(prompt, text, said, before, early) {
    const length = said.length;
    let from = 0;
    for (let to = FIRST_CUT; to < length; to *= 2) {
        text += sample(said, from, to);
        from = to;
        if (early) {
            prompt.cuts.push((before + to) * 4 + KEPT);
            prompt.texts.push(text);
        }
    }
    return text + (from ? sample(said, from, length) : said);
}

// The cuts of a request's body, from the start of its prompt to the end, or null where it has no prompt that is cached:
// {cuts, texts, keys, holders, at, more}. A cut is the length of all that comes before it, times four, plus what it is; its text
// is what its key is made of; `more` is what a batch's other prompts add. Keys, holders and `at` are filled when a replica is
// chosen: the keys and holders that were looked up, and which cut matched.
function cutsOf(body, model) {
    const cuts = [];
    const texts = [];
    const prompt = { cuts, texts, keys: [], holders: [], at: -1, more: 0 };
    const messages = messagesOf(body);
    const said = messages ? '' : promptOf(body);
    if (!messages && !said) {
        return null;
    }
    let text = model;
    let length = 0;
    if (body.tools || body.system || body.instructions || body.cache_salt) {
        const front = frontOf(body);
        text = grow(prompt, text, front, 0, true);
        length = front.length;
        cuts.push(length * 4 + KEPT);
        texts.push(text);
    }
    if (!messages) {
        texts.push(grow(prompt, text, said, length, true));
        cuts.push((length + said.length) * 4 + KEPT + OWN);
        prompt.more = moreOf(body.prompt || body.input);
        return prompt;
    }
    const last = messages.length - 1;
    let own = 0;
    for (let i = 0; i <= last; i++) {
        const message = messages[i];
        if (!message) {
            continue;
        }
        const role = message.role;
        const said = contentOf(message);
        const early = i < 2 || i === last;
        if (!own && (role === 'assistant' || i < last && messages[i + 1] && messages[i + 1].role === 'assistant')) {
            own = OWN;
        }
        text += `\n${typeof role === 'string' ? role : ''}\n`;
        text = said.length > FIRST_CUT ? grow(prompt, text, said, length, early) : text + said;
        length += said.length + 1;
        if (early || i >= last - LOOK_BACK) {
            cuts.push(length * 4 + own + (early ? KEPT : 0));
            texts.push(text);
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
            sum += typeof batch[i] === 'string' ? batch[i].length : Array.isArray(batch[i]) ? 4 * batch[i].length : 0;
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

function hash(text) {
    return crypto.createHash('md5').update(text).digest('base64');
}

// The key of the i-th cut.
function key(prompt, i) {
    return prompt.keys[i] || (prompt.keys[i] = hash(prompt.texts[i]));
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

export default { KEPT, OWN, cutsOf, hash, key, holders, holds, keep };
