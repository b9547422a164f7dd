// What a request asks for, read out of its body.
//
// Parsing makes an object of every value, and reads texts character by character. So a body's long texts are cut out first
// (texts.js), and what is left is parsed if it is short. Else the body is looked through in slices: it is parsed if little is in
// it, or its fields are taken from where they stand.

import budget from './budget.js';
import bytes from './bytes.js';
import json from './json.js';
import texts from './texts.js';
import upload from './upload.js';

const SHORT = 1 << 17;       // characters: parsed whatever is in it
const PLAIN = 1 << 20;       // bytes: client_body_buffer_size, up to which a body lies in memory
const PARSED = 1 << 20;      // characters: parsed if there are not more values in it …
const VALUES = 1 << 14;      // … than these
const BEGINNING = 1 << 18;   // characters of a long body's prompt that are taken for its beginning
const NUMBER = 64;           // characters, at most, of a number in it
const NAME = 1 << 15;        // characters, at most, of a model's name or a session's key in a long body

const UPLOAD = /^\s*multipart\//i;
const NAMES = ['model', 'prompt_cache_key', 'stream', 'stream_options'];
// what limits.js asks for
const NUMBERS = ['max_tokens', 'max_completion_tokens', 'max_output_tokens', 'n', 'best_of'];
// To count tokens is no work, and needs no cache.
const COUNTING = { '/tokenize': true, '/detokenize': true, '/v1/messages/count_tokens': true };
// in the order of the rendered prompt
const PROMPTS = ['cache_salt', 'tools', 'system', 'instructions', 'messages', 'prompt', 'input'];

// Whether the body is one of JSON that lies in memory, given its headers Content-Type and Content-Length.
function isPlain(type, length) {
    return length <= PLAIN && (!type || type === 'application/json' || !UPLOAD.test(type));
}

// A promise of what `plain` takes: the value of a plain body, or its bytes where long texts may be in it.
function take(r, length) {
    return length <= texts.FIRST_CUT ? r.readRequestJSON() : r.readRequestArrayBuffer();
}

// {model, body, session, unreadable} of a plain body: the model's name or '', what prefix.js cuts, what the session is called,
// and what of the body can't be read, if the replica might read it. Bodies that are no JSON object give no model: the replica says
// what is wrong. Null if the body has to be looked through.
function plain(r, length, taken) {
    let found = taken;
    if (length > texts.FIRST_CUT) {
        const text = texts.shortened(new Uint8Array(taken));
        found = text.length <= SHORT ? parse(text) : null;
    }
    return found && typeof found === 'object' ? asked(r, found) : null;
}

// The same of any body.
async function read(r) {
    return asked(r, await look(r, r.headersIn['Content-Type'] || ''));
}

function asked(r, body) {
    const key = body.prompt_cache_key;
    const model = body.model;
    return {
        // Nothing that long is called so, and a stand-in must not be seen.
        model: typeof model === 'string' && !texts.isStandIn(model) ? model : '',
        body: COUNTING[r.uri] ? {} : body,
        session: r.variables.session || (typeof key === 'string' ? key : ''),
        unreadable: body.unreadable,
    };
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

// The fields of a body that is long, an upload, or JSON as Python writes it.
async function look(r, type) {
    const file = r.variables.request_body_file;
    const body = file ? bytes.inFile(file) : bytes.inMemory(new Uint8Array(await r.readRequestArrayBuffer() || 0));
    budget.settle(r, body.size);
    const turn = bytes.turns();
    try {
        return UPLOAD.test(type) ? await upload.fields(body, type, turn) : await scan(body, turn);
    } finally {
        turn.end();
        body.close();
    }
}

async function scan(body, turn) {
    const looked = await json.fields(body, NAMES.concat(NUMBERS, PROMPTS), turn);
    if (!looked) {
        return {};
    }
    if (body.length <= PARSED && looked.values <= VALUES) {
        const parsed = parse(body.text(0, body.length));
        if (parsed) {
            return parsed;
        }
    }
    const found = {};
    for (const name of NAMES) {
        const [begin, end] = looked.found[name] || [0, 0];
        found[name] = end - begin <= NAME ? (parse(`[${body.text(begin, end)}]`) || [])[0] : undefined;
    }
    for (const name of NUMBERS) {
        const [begin, end] = looked.found[name] || [0, 0];
        // '' is no number, and refused as such.
        found[name] = end - begin <= NUMBER ? (parse(`[${body.text(begin, end)}]`) || [''])[0] : '';
    }
    let left = BEGINNING;
    found.prompt = '';
    for (const name of PROMPTS) {
        const [begin, end] = looked.found[name] || [0, 0];
        const to = Math.min(end, begin + left);
        left -= to - begin;
        found.prompt += body.text(begin, to);
    }
    return found;
}

export default { isPlain, take, plain, read };
