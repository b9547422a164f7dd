// The gateway's own metrics, in Prometheus' text format.
//
// A request costs four additions: its series, its two histogram buckets (one counter holds both), and two sums.

import fleet from './fleet.js';
import misses from './misses.js';
import usage from './usage.js';
import vitals from './vitals.js';

const counters = ngx.shared.counters;

const STATES = ['ready', 'asleep', 'loading', 'wedged', 'draining', 'stopped', 'unreachable'];
const CAUSES = { retry: ['connect', 'reset', 'timeout', 'failed', 'refused', 'draining', 'asleep'],
    refusal: ['full', 'none_ready', 'asleep', 'failed', 'unknown_model', 'closed', 'key', 'role', 'limit', 'quota', 'url', 'host', 'origin',
        'media', 'connection', 'bodies', 'invalid'] };
const FILES = ['keys.json', 'tokens.json', 'jwks'];
const FIRST_BYTE = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60];
const SERIES = 10000;   // of gateway_requests_total; with the longest names they take 6 MiB of the zone's 10
const LONGEST = 256;    // characters of a model's name
const TURN = 500;       // counters shown between two turns of the requests
const OTHER = 'other';  // the model of what is beyond
const DURATION = [0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600];

function add(key, value) {
    try {
        counters.incr(key, value, 0);
    } catch (e) {
        fleet.lost('counters', e);
    }
}

function bucket(bounds, value) {
    let i = 0;
    // Beyond the last one there is no greater.
    while (value > bounds[i]) {
        i++;
    }
    return i;
}

let latest = '';    // the counter that was used last

// The counter of a request's labels. The model comes last: its name may hold anything.
function series(replica, status, reason, model) {
    const labels = 'request|' + replica + '|' + status + '|' + reason + '|';
    const key = labels + (model.length > LONGEST ? OTHER : model);
    if (key === latest || counters.has(key)) {
        return latest = key;
    }
    if ((counters.get('series') || 0) >= SERIES) {
        return labels + OTHER;
    }
    add('series', 1);
    return key;
}

// A request is over. `firstByte` is NaN where none came from a replica.
function served(replica, model, status, reason, firstByte, seconds) {
    add(series(replica, status, reason, model), 1);
    if (replica) {
        const began = firstByte >= 0;
        add('buckets|' + replica + '|' + (began ? bucket(FIRST_BYTE, firstByte) : '') + '|' + bucket(DURATION, seconds), 1);
        add('seconds|' + replica, seconds);
        if (began) {
            add('first|' + replica, firstByte);
        }
    }
}

function refused(cause) {
    add(`refusal|${cause}`, 1);
}

function retried(replica, cause) {
    add(`retry|${replica}|${cause}`, 1);
}

function cut(replica) {
    add(`cut|${replica}`, 1);
}

// Spans that were sent to their store, or lost.
function spans(result, count) {
    add(`spans|${result}`, count);
}

// A file of secrets/ was not taken.
function broken(file) {
    add(`broken|${file}`, 1);
}

function probed(replica, ok, tokens) {
    add(`probe|${replica}|${ok ? 'token' : 'no_token'}`, 1);
    add(`probe_tokens|${replica}`, tokens);
}

function looked(replica, ok) {
    add(`probe|${replica}|${ok ? 'alive' : 'dead'}`, 1);
}

function blocks(matched, missed) {
    if (matched) {
        add('blocks|matched', matched);
    }
    if (missed) {
        add('blocks|missed', missed);
    }
}

function refusals() {
    const found = {};
    for (const cause of CAUSES.refusal) {
        found[cause] = counters.get(`refusal|${cause}`) || 0;
    }
    return found;
}

// ---- the text

function escape(value) {
    return !/[\\"\n]/.test(value) ? value : value.replaceAll('\\', '\\\\').replaceAll('"', '\\"').replaceAll('\n', '\\n');
}

function line(name, labels, value) {
    const pairs = Object.keys(labels).map((key) => `${key}="${escape(labels[key])}"`);
    return `${name}${pairs.length ? `{${pairs}}` : ''} ${value}\n`;
}

function head(name, type, help) {
    return `# HELP ${name} ${help}\n# TYPE ${name} ${type}\n`;
}

function histogram(name, help, bounds, of, sums) {
    let text = head(name, 'histogram', help);
    for (const replica of Object.keys(of)) {
        let count = 0;
        bounds.concat('+Inf').forEach((le, i) => {
            count += of[replica][i] || 0;
            text += line(`${name}_bucket`, { replica, le }, count);
        });
        text += line(`${name}_sum`, { replica }, sums(replica)) + line(`${name}_count`, { replica }, count);
    }
    return text;
}

// Lets requests have their turn: without a millisecond the timer would fire before they do.
function others() {
    return new Promise((resolve) => setTimeout(resolve, 1));
}

// Everything, as text, which each piece goes to `send` of. What is known to be countable shows from the start, at 0: rate() sees
// no birth.
async function text(r, send) {
    const table = fleet.table();
    let requests = head('gateway_requests_total', 'counter', 'Requests that are over, by why the replica was chosen.');
    let turn = 0;
    const first = {};
    const total = {};
    for (const { name } of table.replicas) {
        first[name] = {};
        total[name] = {};
    }
    const cached = { expected: '', missed: '' };
    const plus = (to, key, value) => { to[key] = (to[key] || 0) + value; };
    for (const [key, value] of counters.items(fleet.ALL)) {
        if (++turn % TURN === 0) {
            send(requests);
            requests = '';
            await others();
        }
        // There may be thousands: line() would take its time, and a name may hold many bars.
        const labels = /^request\|([^|]*)\|([^|]*)\|([^|]*)\|/.exec(key);
        if (labels) {
            requests += `gateway_requests_total{replica="${labels[1]}",model="${escape(key.slice(labels[0].length))}",`
                + `status="${labels[2]}",reason="${labels[3]}"} ${value}\n`;
        } else if (key.startsWith('buckets|')) {
            const [, replica, began, over] = key.split('|');
            if (began !== '') {
                plus(first[replica] = first[replica] || {}, began, value);
            }
            plus(total[replica] = total[replica] || {}, over, value);
        } else if (key.startsWith('expected ') || key.startsWith('missed ')) {
            const { kind, client, key: name, model } = misses.labelled(key);
            cached[kind] += line(`gateway_${kind}_cached_tokens_total`, { client, key: name, model }, value);
        }
    }
    const sum = (kind) => (replica) => counters.get(`${kind}|${replica}`) || 0;
    const count = (...key) => counters.get(key.join('|')) || 0;

    let out = requests;
    out += histogram('gateway_time_to_first_byte_seconds', 'From the request to the first byte of the answer.', FIRST_BYTE,
        first, sum('first'));
    out += histogram('gateway_request_duration_seconds', 'From the request to the end of the answer.', DURATION, total,
        sum('seconds'));
    const all = table.replicas.concat(fleet.tritons());
    out += head('gateway_requests_in_flight', 'gauge', 'Requests that a replica has now.');
    for (const { name } of all) {
        out += line('gateway_requests_in_flight', { replica: name }, fleet.inFlight(name));
    }
    out += head('gateway_replica_state', 'gauge', 'Whether the replica is in this state.');
    for (const { name, state } of table.replicas) {
        for (const one of STATES) {
            out += line('gateway_replica_state', { replica: name, state: one }, Number(state === one));
        }
    }
    out += head('gateway_retries_total', 'counter', 'Tries that failed before the first byte, by the replica that failed.');
    for (const { name } of all) {
        for (const cause of CAUSES.retry) {
            out += line('gateway_retries_total', { replica: name, cause }, count('retry', name, cause));
        }
    }
    out += head('gateway_streams_cut_total', 'counter', 'Streams that had begun when their replica was lost.');
    for (const { name } of all) {
        out += line('gateway_streams_cut_total', { replica: name }, count('cut', name));
    }
    out += head('gateway_probes_total', 'counter', 'Looks at a replica (alive, dead) and one-token requests (token, no_token).');
    for (const { name } of table.replicas) {
        for (const result of ['alive', 'dead', 'token', 'no_token']) {
            out += line('gateway_probes_total', { replica: name, result }, count('probe', name, result));
        }
    }
    out += head('gateway_refusals_total', 'counter', 'Requests that the gateway itself refused.');
    for (const cause of CAUSES.refusal) {
        out += line('gateway_refusals_total', { cause }, count('refusal', cause));
    }
    out += head('gateway_body_bytes', 'gauge', 'Bytes of requests\' bodies that lie in the gateway, by where.');
    for (const place of ['memory', 'disk']) {
        out += line('gateway_body_bytes', { place }, fleet.number(`body:${place}`));
    }
    const counts = usage.all();
    const labelled = (...kinds) => counts.filter((one) => kinds.includes(one.kind));
    out += head('gateway_key_requests_total', 'counter', 'Requests that a replica answered, by whose key it was.');
    labelled('requests').forEach(({ key, end_user: user, model, replica, value }) => {
        out += line('gateway_key_requests_total', { key, end_user: user, model, replica }, value);
    });
    out += head('gateway_tokens_total', 'counter', "Tokens by the engine's word; the cached ones are among the prompt's. Repeated: "
        + 'a prompt once more for each further answer (n), as the engine counts it.');
    labelled(...usage.KINDS).forEach(({ key, end_user: user, model, replica, kind, value }) => {
        out += line('gateway_tokens_total', { key, end_user: user, model, replica, kind }, value);
    });
    out += head('gateway_audio_seconds_total', 'counter', "Seconds of sound that were heard, by the engine's word.");
    labelled(usage.SECONDS).forEach(({ key, end_user: user, model, replica, value }) => {
        out += line('gateway_audio_seconds_total', { key, end_user: user, model, replica }, value);
    });
    out += head('gateway_probe_tokens_total', 'counter', 'Tokens of the one-token requests, which belong to no key.');
    for (const { name } of table.replicas) {
        out += line('gateway_probe_tokens_total', { replica: name }, count('probe_tokens', name));
    }
    out += head('gateway_unmetered_total', 'counter', 'Answers whose replica did not say what they used.');
    out += line('gateway_unmetered_total', {}, counters.get('unmetered') || 0);
    out += head('gateway_secrets_refused_total', 'counter', 'Looks at a file of secrets/ that is wrong; the one before stays in force.');
    for (const file of FILES) {
        out += line('gateway_secrets_refused_total', { file }, count('broken', file));
    }
    out += head('gateway_spans_total', 'counter', 'Spans of traces, by whether their store took them.');
    for (const result of ['sent', 'lost']) {
        out += line('gateway_spans_total', { result }, count('spans', result));
    }
    out += head('gateway_prefix_blocks_total', 'counter', 'Cuts of prompts that the chosen replica had been sent before.');
    for (const result of ['matched', 'missed']) {
        out += line('gateway_prefix_blocks_total', { result }, count('blocks', result));
    }
    out += head('gateway_expected_cached_tokens_total', 'counter', "Prompts' tokens that the replica's cache should have had.");
    out += cached.expected;
    out += head('gateway_missed_cached_tokens_total', 'counter', 'Those of them that the engine did not find there.');
    out += cached.missed;
    out += head('gateway_writes_lost_total', 'counter', 'Writes into a shared dictionary that had no room left.');
    for (const zone of fleet.ZONES) {
        out += line('gateway_writes_lost_total', { zone }, count('lost', zone));
    }
    for (const [name, help, values] of vitals.gauges(r)) {
        out += head(name, 'gauge', help) + values.map(([labels, value]) => line(name, labels, value)).join('');
    }
    send(out);
}

async function show(r) {
    r.headersOut['Content-Type'] = 'text/plain; version=0.0.4; charset=utf-8';
    r.status = 200;
    r.sendHeader();
    try {
        if (r.method !== 'HEAD') {
            await text(r, (piece) => r.send(piece));
        }
        r.finish();
    } catch (e) {
        // Whoever asked has hung up: there is nobody to tell.
        ngx.log(ngx.INFO, `metrics: ${e.message}`);
    }
}

export default { served, refused, broken, retried, cut, probed, looked, spans, blocks, refusals, show };
