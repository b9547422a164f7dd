// The gateway's own metrics, in Prometheus' text format.
//
// A request costs four additions: its series, its two histogram buckets (one counter holds both), and two sums.

import fleet from './fleet.js';
import usage from './usage.js';

const counters = ngx.shared.counters;

const STATES = ['ready', 'loading', 'wedged', 'draining', 'unreachable'];
const CAUSES = { retry: ['connect', 'reset', 'timeout', 'failed', 'refused', 'draining'],
    refusal: ['full', 'none_ready', 'failed', 'unknown_model', 'closed', 'key', 'role', 'limit', 'quota', 'url', 'host', 'origin',
        'media', 'connection', 'bodies'] };
const FILES = ['keys.json', 'tokens.json', 'jwks'];
const FIRST_BYTE = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60];
const SERIES = 10000;   // of gateway_requests_total; with the longest names they take 6 MiB of the zone's 8
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
    while (i < bounds.length && value > bounds[i]) {
        i++;
    }
    return i;
}

// The counter of a request's labels. The model comes last: its name may hold anything.
function series(replica, status, reason, model) {
    const labels = 'request|' + replica + '|' + status + '|' + reason + '|';
    const key = labels + (model.length > LONGEST ? OTHER : model);
    if (counters.has(key)) {
        return key;
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

// A file of secrets/ was not taken.
function broken(file) {
    add(`broken|${file}`, 1);
}

function probed(replica, ok) {
    add(`probe|${replica}|${ok ? 'token' : 'no_token'}`, 1);
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
async function text(send) {
    const table = fleet.table();
    let requests = head('gateway_requests_total', 'counter', 'Requests that are over, by why the replica was chosen.');
    let turn = 0;
    const first = {};
    const total = {};
    for (const { name } of table.replicas) {
        first[name] = {};
        total[name] = {};
    }
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
        }
    }
    const sum = (kind) => (replica) => counters.get(`${kind}|${replica}`) || 0;
    const count = (...key) => counters.get(key.join('|')) || 0;

    let out = requests;
    out += histogram('gateway_time_to_first_byte_seconds', 'From the request to the first byte of the answer.', FIRST_BYTE,
        first, sum('first'));
    out += histogram('gateway_request_duration_seconds', 'From the request to the end of the answer.', DURATION, total,
        sum('seconds'));
    out += head('gateway_requests_in_flight', 'gauge', 'Requests that a replica has now.');
    for (const { name } of table.replicas) {
        out += line('gateway_requests_in_flight', { replica: name }, fleet.inFlight(name));
    }
    out += head('gateway_replica_state', 'gauge', 'Whether the replica is in this state.');
    for (const { name, state } of table.replicas) {
        for (const one of STATES) {
            out += line('gateway_replica_state', { replica: name, state: one }, Number(state === one));
        }
    }
    out += head('gateway_retries_total', 'counter', 'Tries that failed before the first byte, by the replica that failed.');
    for (const { name } of table.replicas) {
        for (const cause of CAUSES.retry) {
            out += line('gateway_retries_total', { replica: name, cause }, count('retry', name, cause));
        }
    }
    out += head('gateway_streams_cut_total', 'counter', 'Streams that had begun when their replica was lost.');
    for (const { name } of table.replicas) {
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
    const labelled = (kind) => counts.filter((one) => kind === 'requests' ? one.kind === kind : usage.KINDS.includes(one.kind));
    out += head('gateway_key_requests_total', 'counter', 'Requests that a replica answered, by whose key it was.');
    labelled('requests').forEach(({ key, end_user: user, model, replica, value }) => {
        out += line('gateway_key_requests_total', { key, end_user: user, model, replica }, value);
    });
    out += head('gateway_tokens_total', 'counter', "Tokens by the engine's word; the cached ones are among the prompt's.");
    labelled('tokens').forEach(({ key, end_user: user, model, replica, kind, value }) => {
        out += line('gateway_tokens_total', { key, end_user: user, model, replica, kind }, value);
    });
    out += head('gateway_unmetered_total', 'counter', 'Answers whose replica did not say what they used.');
    out += line('gateway_unmetered_total', {}, counters.get('unmetered') || 0);
    out += head('gateway_secrets_refused_total', 'counter', 'Looks at a file of secrets/ that is wrong; the one before stays in force.');
    for (const file of FILES) {
        out += line('gateway_secrets_refused_total', { file }, count('broken', file));
    }
    out += head('gateway_prefix_blocks_total', 'counter', 'Cuts of prompts that the chosen replica had been sent before.');
    for (const result of ['matched', 'missed']) {
        out += line('gateway_prefix_blocks_total', { result }, count('blocks', result));
    }
    out += head('gateway_writes_lost_total', 'counter', 'Writes into a shared dictionary that had no room left.');
    for (const zone of fleet.ZONES) {
        out += line('gateway_writes_lost_total', { zone }, count('lost', zone));
    }
    send(out);
}

async function show(r) {
    r.headersOut['Content-Type'] = 'text/plain; version=0.0.4; charset=utf-8';
    r.status = 200;
    r.sendHeader();
    try {
        if (r.method !== 'HEAD') {
            await text((piece) => r.send(piece));
        }
        r.finish();
    } catch (e) {
        // Whoever asked has hung up: there is nobody to tell.
        ngx.log(ngx.INFO, `metrics: ${e.message}`);
    }
}

export default { served, refused, broken, retried, cut, probed, looked, blocks, refusals, show };
