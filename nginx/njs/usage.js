// What each request used, by the engine's own word.
//
// The replicas put a running usage into every chunk of a stream and the whole one into a last chunk without choices. The last
// one seen is kept, also of a stream that its client leaves; what the client did not ask for is taken out of the stream.

import fleet from './fleet.js';

const shared = ngx.shared.usage;
const counters = ngx.shared.counters;

const USED = ['prompt', 'cached', 'completion'];   // of tokens
// A usage has each prompt once. The engine's own counters have it for each of its answers: `repeated` is what they have more.
const KINDS = [...USED, 'repeated'];
const SECONDS = 'audio_seconds';
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
const CREATED = 4;        // events of a response before its first token
const BYTES = 4;          // of a request for a token

// Paths whose streams get usage that nobody asked for.
const FORCED = /^\/v1\/(chat\/completions|completions|audio\/(transcriptions|translations))$/;
const AUDIO = /^\/v1\/audio\//;
// Paths that the model has no part in.
const UNCOUNTED = /tokenize$|\/count_tokens$/;
// Where a whole answer has its usage, if not after `"usage":`; /v1/systemone also has the client's words for names.
const PLACES = { '/v2/embed': Buffer.from('"billed_units":{'), '/v1/systemone': Buffer.from('"usage":{"input_tokens":') };

const YES = /^(true|t|1|on|yes|y)$/i;   // as the replica reads it in a form

// Paths that take `n`.
const SEVERAL = /^\/v1\/(chat\/completions(\/batch)?|completions)$/;

// What the client asked for of usage in its stream: '' (nothing), 'last' (a last chunk), 'all' (in every chunk).
function wanted(body) {
    const { stream_options: options } = body;
    if (options && options.include_usage) {
        return options.continuous_usage_stats ? 'all' : 'last';
    }
    return YES.test(body.stream_include_usage) ? YES.test(body.stream_continuous_usage_stats) ? 'all' : 'last' : '';
}

const ONE_PROMPT = 1e9;   // answers that all have the same prompt, however many the replica reads there

// The answers that are asked for each prompt, as text, where there may be several in a stream, each of which tells its own usage;
// else ''.
function many(uri, body) {
    const n = body.n ?? 1;
    const count = typeof n === 'number' || typeof n === 'string' ? Math.floor(n) : 1;
    if (uri === '/v1/completions') {
        return String(count > 1 ? count : 1);
    }
    return n === 1 || !SEVERAL.test(uri) ? '' : String(count > 1 ? count : ONE_PROMPT);
}

// What a Buffer has in its place looks at one byte after the other.
const find = Uint8Array.prototype.indexOf;

// Where the object that begins here ends, which may hold further objects but no text with braces.
function endOf(bytes, from) {
    let close = find.call(bytes, CLOSE, from);
    for (let open = find.call(bytes, OPEN, from); open >= 0 && open < close; open = find.call(bytes, OPEN, open + 1)) {
        close = find.call(bytes, CLOSE, close + 1);
    }
    return close;
}

// Whole events of a stream, as the client gets them.
function events(r, bytes) {
    if (r.rewrite) {
        return r.rewrite(r, bytes);
    }
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
        r.usage = bytes.toString('utf8', begin, close + 1);
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

// Whether something has to be taken out of this stream.
function strips(r) {
    return r.rewrite || r.forced && r.wants !== 'all';
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
    r.usage = textAt(bytes, at + PLAIN.length - 1);
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
                return JSON.stringify(response.usage);
            } catch (e) {
                return null;
            }
        }
    }
    return null;
}

// The text of the usage that begins here, with what follows it where its end is not there.
function textAt(bytes, begin) {
    const close = endOf(bytes, begin + 1);
    return bytes.toString('utf8', begin, Math.min(begin + PIECE, close < 0 ? bytes.length : close + 1));
}

// A piece of an answer that is no stream, where the usage may be: it is all that is kept of it. `only`: no other follows.
function piece(r, bytes, only) {
    if (!bytes.length) {
        return;
    }
    const seam = r.tail ? Buffer.concat([Buffer.from(r.tail), bytes]) : bytes;
    const at = seam.lastIndexOf(PLACES[r.uri] || PLAIN);
    if (at >= 0) {
        r.usage = textAt(seam, seam.indexOf(OPEN, at));
    } else if (!r.tail && AUDIO.test(r.uri)) {
        // verbose_json has no usage, but begins with the sound's length.
        const [, length] = /^\{"duration":([\d.]+)/.exec(seam.toString('utf8', 0, Math.min(64, seam.length))) || [];
        r.usage = length && `{"seconds":${Math.ceil(length)}}`;
    }
    if (!only) {
        r.tail = seam.toString('utf8', Math.max(0, seam.length - PIECE), seam.length);
    }
}

// The object that a text begins with: one of numbers, and of further such objects.
function parse(text) {
    if (!text) {
        return null;
    }
    try {
        return JSON.parse(text);
    } catch (e) {
        return null;
    }
}

// A number of tokens, or undefined where it is none.
function tokens(value) {
    return Number.isSafeInteger(value) && value >= 0 ? value : undefined;
}

// {prompt, cached, completion, and of a sound audio_seconds} of a usage in the words of this API, or null. With Anthropic's the
// cached tokens are not in the input.
function counts(uri, usage) {
    if (!usage) {
        return null;
    }
    let prompt, cached, completion;
    if (usage.seconds !== undefined && AUDIO.test(uri) && tokens(usage.seconds) !== undefined) {
        return { prompt: 0, cached: 0, completion: 0, [SECONDS]: usage.seconds };
    }
    if (uri === '/v2/embed') {
        prompt = tokens(usage.input_tokens) + (tokens(usage.image_tokens) || 0);
    } else if (uri === '/v1/responses' || uri === '/v1/messages' || uri === '/v1/systemone') {
        const apart = uri === '/v1/messages' ? tokens(usage.cache_read_input_tokens) || 0 : 0;
        const details = usage.input_tokens_details;
        prompt = tokens(usage.input_tokens) + apart;
        cached = apart || details && tokens(details.cached_tokens);
        completion = tokens(usage.output_tokens);
    } else {
        const details = usage.prompt_tokens_details;
        prompt = tokens(usage.prompt_tokens) ?? tokens(usage.total_tokens);
        cached = details && tokens(details.cached_tokens);
        completion = tokens(usage.completion_tokens);
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
    const many = found && !r.one ? Number(r.variables.many) : 0;
    if (many > 1 && many !== ONE_PROMPT) {
        found.repeated = found.prompt * (many - 1);
    }
    return found;
}

// By the last usage of the one answer.
function told(r) {
    if (!r.usage) {
        return untold(r);
    }
    const last = parse(r.usage);
    const found = counts(r.uri, r.first && r.first !== r.usage ? Object.assign({}, parse(r.first), last) : last);
    if (found && r.first && r.first === r.usage && r.events > 2) {
        // Left half-way, where only the prompt's tokens were told: an event is a token, but for those at the beginning.
        found.completion = Math.max(found.completion, r.events - 2);
    }
    return found;
}

// Of an answer without a usage in it.
function untold(r) {
    if (UNCOUNTED.test(r.uri)) {
        return { prompt: 0, cached: 0, completion: 0 };
    }
    const before = AUDIO.test(r.uri) ? 0 : r.uri === '/v1/responses' ? CREATED : Infinity;
    if (r.events > before) {
        // Left half-way: an event is a token at least, but for those at the beginning. Nothing tells the prompt.
        const prompt = before && Math.ceil((Number(r.variables.content_length) || 0) / BYTES);
        return { prompt, cached: 0, completion: r.events - before };
    }
    // Vectors that come as bytes have it in a header.
    try {
        return counts(r.uri, JSON.parse(r.variables.upstream_http_metadata || '{}').usage);
    } catch (e) {
        return null;
    }
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

let latest = '';    // the series that was counted last

// The labels of a series. Of these only a model's name may hold a space, and it comes last.
function series(replica, key, endUser, model) {
    const whole = replica + ' ' + key + ' ' + endUser + ' ' + (model.length > LONGEST ? OTHER : model);
    if (whole === latest || shared.has('requests ' + whole)) {
        return latest = whole;
    }
    if ((shared.get('series') || 0) < SERIES) {
        add('series', 1);
        return whole;
    }
    return `${replica} ${key} ${endUser ? OTHER : ''} ${OTHER}`;
}

let summed = false;

// What a key has used over all of its series lies apart, under `kind:key`. What an older gateway has kept is summed once. What
// came without a key is summed when somebody asks.
function sum(kind, key, value) {
    if (!summed && !shared.has('summed') && add('summed', 1) === 1) {
        for (const one of all()) {
            add(`${one.kind}:${one.key}`, one.value);
        }
    }
    summed = true;
    add(`${kind}:${key}`, value);
}

// {requests, prompt, cached, completion, audio_seconds} of a key, of those that it has.
function of(key) {
    const found = {};
    if (!key) {
        all().filter((one) => !one.key && one.kind !== 'repeated')
            .forEach(({ kind, value }) => { found[kind] = (found[kind] || 0) + value; });
        return found;
    }
    sum('requests', key, 0);
    for (const kind of ['requests', ...USED, SECONDS]) {
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
    count(key, labels, 'requests', 1);
    if (found) {
        // Each by its name: to look them up in a loop would cost as much as to count two.
        const { prompt, cached, completion, repeated } = found;
        if (prompt) {
            count(key, labels, 'prompt', prompt);
        }
        if (cached) {
            count(key, labels, 'cached', cached);
        }
        if (completion) {
            count(key, labels, 'completion', completion);
        }
        if (repeated) {
            count(key, labels, 'repeated', repeated);
        }
        if (found[SECONDS]) {
            count(key, labels, SECONDS, found[SECONDS]);
        }
    } else {
        counters.incr('unmetered', 1, 0);
    }
}

function count(key, labels, kind, value) {
    // A key has used what it is charged for.
    if (key && kind !== 'repeated') {
        sum(kind, key, value);
    }
    add(kind + ' ' + labels, value);
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

export default { KINDS, SECONDS, UNCOUNTED, wanted, many, events, strips, piece, used, counts, record, of, all };
