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
const [LIST, OPEN, CLOSE] = [91, 123, 125];
const PIECE = 1024;       // bytes of an answer's usage with what is around it

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
        r.wants = FORCED.test(r.uri) ? r.variables.wants || '' : 'all';
        r.events = 0;
    }
    r.events++;
    let at = bytes.indexOf(r.wants === 'all' ? PLAIN : NEEDLE);
    if (at < 0) {
        return bytes;
    }
    if (r.wants === 'all') {
        keep(r, bytes, bytes.lastIndexOf(PLAIN) + PLAIN.length - 1);
        return bytes;
    }
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
        if (bytes[at - 2] !== LIST) {
            const piece = bytes.subarray(from, at);
            out = out ? Buffer.concat([out, piece]) : piece;
            from = close + 1;
            if (r.variables.many) {
                each(r, bytes.subarray(0, at));
            }
        } else if (r.wants === 'last') {
            r.each = undefined;
        } else {
            r.each = undefined;
            const before = bytes.lastIndexOf(BLANK, at);
            const start = before < 0 ? 0 : before + 2;
            const end = bytes.indexOf(BLANK, close);
            const piece = bytes.subarray(from, Math.max(start, from));
            out = out ? Buffer.concat([out, piece]) : piece;
            from = end < 0 ? bytes.length : end + 2;
        }
        at = bytes.indexOf(NEEDLE, close);
    }
    if (out === null) {
        return bytes;
    }
    return from < bytes.length ? Buffer.concat([out, bytes.subarray(from)]) : out;
}

// Of several answers in one stream each chunk tells of its own only.
function each(r, before) {
    const choice = before.lastIndexOf('"choices":[{"index":');
    const index = parseInt(String(before.subarray(choice + 20, choice + 26)), 10);
    r.each = r.each || {};
    r.each[index] = r.usage;
}

// Notes the usage that begins at this brace; the first one too, which has the prompt's tokens with Anthropic's API.
function keep(r, bytes, at) {
    r.usage = Buffer.from(bytes.subarray(at, at + PIECE));
    r.first = r.first || r.usage;
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

// {prompt, cached, completion} of a usage in any API's words, or null. With Anthropic's the cached tokens are not in the input.
function counts(usage) {
    if (!usage) {
        return null;
    }
    const details = usage.prompt_tokens_details || usage.input_tokens_details || {};
    const apart = usage.cache_read_input_tokens || 0;
    const cached = details.cached_tokens || apart;
    const prompt = usage.prompt_tokens ?? usage.input_tokens;
    const completion = usage.completion_tokens ?? usage.output_tokens ?? 0;
    return Number.isFinite(prompt ?? usage.total_tokens) ? { prompt: (prompt ?? usage.total_tokens) + apart, cached, completion } : null;
}

// What a request that is over has used, or null where the replica did not say.
function used(r) {
    if (r.each) {
        const all = Object.values(r.each).map((bytes) => counts(parse(bytes))).filter((one) => one);
        return all.length ? Object.assign(all[0], { completion: all.reduce((sum, one) => sum + one.completion, 0) }) : null;
    }
    const last = parse(r.usage);
    const found = counts(Object.assign({}, r.first && r.first !== r.usage ? parse(r.first) : null, last));
    if (found && r.first && r.first === r.usage && r.events > 2 && r.uri.startsWith('/v1/messages')) {
        // Left half-way, where only the prompt's tokens were told: an event is a token, but for those at the beginning.
        found.completion = Math.max(found.completion, r.events - 2);
    }
    return found;
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
            if (found[kind]) {
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

export default { KINDS, wanted, events, piece, used, counts, record, of, all };
