// What a request asks for, read out of its body.
//
// Parsing makes an object of every value: a body of many small ones would hold the worker for seconds. So a long body is looked
// through first, in slices. It is parsed if little is in it; else its fields are taken from where they stand.

import budget from './budget.js';
import bytes from './bytes.js';
import json from './json.js';
import upload from './upload.js';

const SHORT = 1 << 17;       // bytes: parsed whatever is in it
const PARSED = 1 << 20;      // characters: parsed if there are not more values in it …
const VALUES = 1 << 14;      // … than these
const BEGINNING = 1 << 18;   // characters of a long body's prompt that are taken for its beginning
const NUMBER = 64;           // characters, at most, of a number in it
const NAME = 1 << 15;        // characters, at most, of a model's name or a session's key in a long body

const NAMES = ['model', 'prompt_cache_key', 'stream', 'stream_options'];
// what limits.js asks for
const NUMBERS = ['max_tokens', 'max_completion_tokens', 'max_output_tokens', 'n', 'best_of'];
// in the order of the rendered prompt
const PROMPTS = ['cache_salt', 'tools', 'system', 'instructions', 'messages', 'prompt', 'input'];

// {model, body, session, unreadable}: the model's name or '', what prefix.js cuts, what the session is called, and what of the
// body can't be read, if the replica might read it. Bodies that are no JSON object give no model: the replica says what is wrong.
async function read(r) {
    const headers = r.headersIn;
    const type = headers['Content-Type'] || '';
    let body = null;
    if (headers['Content-Length'] <= SHORT && (type === 'application/json' || !/^\s*multipart\//i.test(type))) {
        const text = await r.readRequestText();
        body = text ? parse(text) : {};
    }
    body = body || await look(r, type);
    const session = headers['X-Session-Id'] || headers['X-Claude-Code-Session-Id'] || headers['Session-Id']   // Codex
        || headers['X-OpenWebUI-Chat-Id'] || (typeof body.prompt_cache_key === 'string' ? body.prompt_cache_key : '');
    const uri = r.uri;
    // To count tokens is no work, and needs no cache.
    const counts = uri.endsWith('tokenize') || uri.endsWith('/count_tokens');
    return {
        model: typeof body.model === 'string' ? body.model : '', body: counts ? {} : body, session, unreadable: body.unreadable,
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
        return /^\s*multipart\//i.test(type) ? await upload.fields(body, type, turn) : await scan(body, turn);
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

export default { read };
