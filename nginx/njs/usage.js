// What each request used, by the engine's own word.
//
// The replicas put a running usage into every chunk of a stream and the whole one into a last chunk without choices. The last
// one seen is kept, also of a stream that its client leaves; what the client did not ask for is taken out of the stream.

import fleet from './fleet.js';

const shared = ngx.shared.usage;
const counters = ngx.shared.counters;

const KINDS = ['prompt', 'cached', 'completion'];
const SERIES = 5000;      // of key, end user, model and replica
const LONGEST = 256;      // characters of a model's name
const OTHER = 'other';    // what is beyond
const NEEDLE = Buffer.from(',"usage":{');
const PLAIN = Buffer.from('"usage":{');
const BLANK = Buffer.from('\n\n');
const BLANK_CRLF = Buffer.from('\r\n\r\n');
const NEWLINE = 10;
const [LIST, OPEN, CLOSE] = [91, 123, 125];
const PIECE = 1024;       // bytes of an answer's usage with what is around it

// The events that end a response. Those before repeat what the client sent, such as its tools, and may hold a usage of its making.
const ENDS = ['completed', 'incomplete', 'failed'].map((how) => Buffer.from(`event: response.${how}\n`));
// Paths whose streams get usage that nobody asked for.
const FORCED = /^\/v1\/(chat\/completions|completions|audio\/(transcriptions|translations))$/;

// What the client asked for of usage in its stream: '' (nothing), 'last' (a last chunk), 'all' (in every chunk).
function wanted(body) {
    const { stream_options: options } = body;
    if (options && options.include_usage) {
        return options.continuous_usage_stats ? 'all' : 'last';
    }
    return body.stream_include_usage === 'true' ? body.stream_continuous_usage_stats === 'true' ? 'all' : 'last' : '';
}

const ONE_PROMPT = 1e9;   // answers that all have the same prompt, however many

// The answers for each prompt, as text, where a stream may have several answers, each of which tells its own usage; else ''.
function many(uri, body) {
    const said = body.n ?? 1;
    if (uri !== '/v1/completions') {
        return said === 1 ? '' : String(ONE_PROMPT);
    }
    const count = typeof said === 'number' || typeof said === 'string' ? Math.floor(said) : 1;
    return String(count > 1 ? count : 1);
}

// Where the object that begins here ends, which may hold further objects but no text with braces.
function endOf(bytes, from) {
    let close = bytes.indexOf(CLOSE, from);
    for (let open = bytes.indexOf(OPEN, from); open >= 0 && open < close; open = bytes.indexOf(OPEN, open + 1)) {
        close = bytes.indexOf(CLOSE, close + 1);
    }
    return close;
}

// Whole events of a stream, as the client gets them.
function events(r, bytes) {
    if (r.wants === undefined) {
        r.forced = FORCED.test(r.uri);
        r.wants = r.forced ? r.variables.wants || '' : 'all';
        r.many = r.variables.many;
        r.events = 0;
    }
    r.events++;
    if (!r.forced) {
        keep(r, bytes);
        return bytes;
    }
    let at = bytes.indexOf(NEEDLE);
    let out = null;
    let from = 0;
    while (at >= 0) {
        const begin = at + NEEDLE.length - 1;
        const close = endOf(bytes, begin + 1);
        if (close < 0) {
            break;
        }
        r.usage = Buffer.from(bytes.subarray(begin, close + 1));
        // `"choices":[]` stands before the last one.
        const last = bytes[at - 2] === LIST;
        if (last) {
            r.each = undefined;
        } else if (r.many) {
            each(r, bytes.subarray(0, at));
        }
        const [start, end] = r.wants === 'all' || last && r.wants ? [0, 0] : last ? eventAt(bytes, at, close) : [at, close + 1];
        if (end) {
            const piece = bytes.subarray(from, Math.max(start, from));
            out = out ? Buffer.concat([out, piece]) : piece;
            from = end;
        }
        at = bytes.indexOf(NEEDLE, close);
    }
    if (out === null) {
        return bytes;
    }
    return from < bytes.length ? Buffer.concat([out, bytes.subarray(from)]) : out;
}

// Where the event begins and ends that these two places are in; [0, 0] where other blank lines than vLLM's are between events.
function eventAt(bytes, at, close) {
    const before = bytes.lastIndexOf(BLANK, at);
    const start = before < 0 ? 0 : before + 2;
    const end = bytes.indexOf(BLANK, close);
    return end < 0 || bytes.subarray(start, end).indexOf(BLANK_CRLF) >= 0 ? [0, 0] : [start, end + 2];
}

// Of several answers in one stream each chunk tells of its own only.
function each(r, before) {
    const choice = before.lastIndexOf('"choices":[{"index":');
    const index = parseInt(String(before.subarray(choice + 20, choice + 26)), 10);
    r.each = r.each || {};
    r.each[index] = r.usage;
}

// Notes the usage that stands last in these events; with Anthropic's API the first one too, which has the prompt's tokens.
function keep(r, bytes) {
    const at = bytes.lastIndexOf(PLAIN);
    if (at < 0) {
        return;
    }
    if (r.uri === '/v1/responses') {
        r.usage = ended(bytes) || r.usage;
        return;
    }
    r.usage = Buffer.from(bytes.subarray(at + PLAIN.length - 1, at + PLAIN.length + PIECE));
    if (r.uri === '/v1/messages') {
        r.first = r.first || r.usage;
    }
}

// The usage of the response that ends in these events, or null. A client's words can't begin a line.
function ended(bytes) {
    for (const end of ENDS) {
        const at = bytes.lastIndexOf(end);
        if (at === 0 || bytes[at - 1] === NEWLINE) {
            const data = bytes.indexOf(OPEN, at);
            try {
                const { response } = JSON.parse(String(bytes.subarray(data, bytes.indexOf(NEWLINE, data))));
                return Buffer.from(JSON.stringify(response.usage));
            } catch (e) {
                return null;
            }
        }
    }
    return null;
}

// A piece of an answer that is no stream, where the usage may be: it is all that is kept of it.
function piece(r, bytes) {
    const seam = r.tail ? Buffer.concat([r.tail, bytes]) : bytes;
    const at = seam.lastIndexOf(PLAIN);
    if (at >= 0) {
        r.usage = Buffer.from(seam.subarray(at + PLAIN.length - 1, at + PLAIN.length + PIECE));
    }
    r.tail = Buffer.from(seam.subarray(-PIECE));
}

// The object that a text begins with.
function parse(bytes) {
    const end = bytes ? endOf(bytes, 1) : -1;
    try {
        return end < 0 ? null : JSON.parse(String(bytes.subarray(0, end + 1)));
    } catch (e) {
        return null;
    }
}

// A count of tokens, or undefined where it is none.
function count(object, name) {
    const value = object && object[name];
    return Number.isSafeInteger(value) && value >= 0 ? value : undefined;
}

// {prompt, cached, completion} of a usage in the words of this API, or null. With Anthropic's the cached tokens are not in the input.
function counts(uri, usage) {
    let prompt, cached, completion;
    if (uri === '/v1/responses' || uri === '/v1/messages') {
        const apart = uri === '/v1/messages' ? count(usage, 'cache_read_input_tokens') || 0 : 0;
        prompt = count(usage, 'input_tokens') + apart;
        cached = apart || count(usage && usage.input_tokens_details, 'cached_tokens');
        completion = count(usage, 'output_tokens');
    } else {
        prompt = count(usage, 'prompt_tokens') ?? count(usage, 'total_tokens');
        cached = count(usage && usage.prompt_tokens_details, 'cached_tokens');
        completion = count(usage, 'completion_tokens');
    }
    return prompt >= 0 ? { prompt, cached: cached || 0, completion: completion || 0 } : null;
}

// What a request that is over has used, or null where the replica did not say.
function used(r) {
    const found = r.each ? together(r) : told(r);
    if (found && r.left && r.taken) {
        // stream.js stepped aside for a client that reads slowly: the rest had as many tokens in so many bytes as what it saw.
        const rest = Math.max(Number(r.variables.bytes_sent) - r.passed, 0);
        found.completion = Math.ceil(found.completion * (1 + rest / r.taken));
    }
    return found;
}

// By the last usage of the one answer.
function told(r) {
    const found = counts(r.uri, Object.assign({}, r.first && r.first !== r.usage ? parse(r.first) : null, parse(r.usage)));
    if (found && r.first && r.first === r.usage && r.events > 2) {
        // Left half-way, where only the prompt's tokens were told: an event is a token, but for those at the beginning.
        found.completion = Math.max(found.completion, r.events - 2);
    }
    return found;
}

// The use of all answers in a stream that was left: each prompt once, as it is computed once for its answers.
function together(r) {
    const all = { prompt: 0, cached: 0, completion: 0 };
    const prompts = {};
    for (const index of Object.keys(r.each)) {
        const one = counts(r.uri, parse(r.each[index]));
        if (one) {
            prompts[Math.floor(index / r.many)] = one;
            all.completion += one.completion;
        }
    }
    const begun = Object.values(prompts);
    for (const one of begun) {
        all.prompt += one.prompt;
        all.cached += one.cached;
    }
    return begun.length ? all : null;
}

// Adds to a counter, and gives it; nothing where it has no room.
function add(key, value) {
    try {
        return shared.incr(key, value, 0);
    } catch (e) {
        fleet.lost('usage', e);
        return undefined;
    }
}

// The labels of a series. Of these only a model's name may hold a space, and it comes last.
function series(replica, key, endUser, model) {
    const whole = `${replica} ${key} ${endUser} ${model.length > LONGEST ? OTHER : model}`;
    if (shared.has(`requests ${whole}`)) {
        return whole;
    }
    if ((shared.get('series') || 0) < SERIES) {
        add('series', 1);
        return whole;
    }
    return `${replica} ${key} ${endUser ? OTHER : ''} ${OTHER}`;
}

// What a key has used over all of its series lies apart, under `kind:key`. What an older gateway has kept is summed once.
function sum(kind, key, value) {
    if (!shared.has('summed') && add('summed', 1) === 1) {
        for (const one of all()) {
            add(`${one.kind}:${one.key}`, one.value);
        }
    }
    add(`${kind}:${key}`, value);
}

// {requests, prompt, cached, completion} of a key, of those that it has.
function of(key) {
    sum('requests', key, 0);
    const found = {};
    for (const kind of ['requests', ...KINDS]) {
        const value = shared.get(`${kind}:${key}`);
        if (value) {
            found[kind] = value;
        }
    }
    return found;
}

// Counts a request that a replica answered.
function record(replica, key, endUser, model, found) {
    const labels = series(replica, key, endUser, model);
    sum('requests', key, 1);
    add(`requests ${labels}`, 1);
    if (found) {
        for (const kind of KINDS) {
            if (found[kind] > 0) {
                sum(kind, key, found[kind]);
                add(`${kind} ${labels}`, found[kind]);
            }
        }
    } else {
        counters.incr('unmetered', 1, 0);
    }
}

// All counters: [{kind, replica, key, end_user, model, value}].
function all() {
    const found = [];
    for (const [name, value] of shared.items(fleet.ALL)) {
        const [kind, replica, key, endUser, ...model] = name.split(' ');
        if (replica !== undefined) {
            found.push({ kind, key, end_user: endUser, model: model.join(' '), replica, value });
        }
    }
    return found;
}

export default { KINDS, wanted, many, events, piece, used, counts, record, of, all };
