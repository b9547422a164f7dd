// One span a request, for the service of the profile `traces`. Where TRACE_SAMPLE is not set nothing here runs.
//
// A trace is the client's (W3C trace context) or begins here; the replica gets it with this span as the parent. Whether it is kept
// depends on its id alone, so that all who sample by the id's end agree. A request that failed is kept in any case. Spans wait in
// the shared dictionary `spans`, of which one worker sends what is there by OTLP; what finds no room or no store is counted.

import metrics from './metrics.js';
import settings from './settings.js';

const shared = ngx.shared.spans;
const counters = ngx.shared.counters;

// Binary, which every store takes; JSON not every one.
const URL = 'http://traces:4318/v1/traces';
const TYPE = 'application/x-protobuf';
const MOST = 2000;        // spans that wait; each has at most some 2 KiB, and the zone bounds their bytes
const BATCH = 100;        // spans of one message: while it is written, requests wait
const TURN = 1000;        // ms in which further messages are begun

// https://www.w3.org/TR/trace-context/#traceparent-header. Version 00 has no more fields, ff is none.
const PARENT = /^(?!ff)(?:00(?=.{53}$)|(?!00)[0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?$/;
const RANDOM = [18, 31];  // the digits of an id by which its trace is kept: what is random in each, as far as a number holds it

// What GenAI's conventions call these; the others are the HTTP route's business.
const OPERATIONS = {
    '/v1/chat/completions': 'chat', '/v1/chat/completions/batch': 'chat', '/v1/messages': 'chat', '/v1/responses': 'chat',
    '/v1/completions': 'text_completion', '/v1/embeddings': 'embeddings', '/v2/embed': 'embeddings',
};

// [trace, parent's span, flags] of a header, or null: of what is malformed, or there twice, nothing is taken over.
function parse(header) {
    const found = header === undefined ? null : PARENT.exec(header);
    return found && found.slice(1);
}

// Whether the share of traces that is kept has this one.
function kept(id) {
    const [from, to] = RANDOM;
    return parseInt(id.slice(from, to), 16) >= (1 - settings.traces) * 16 ** (to - from);
}

// A request that is its own in this gateway gives this span its id, and a trace that begins here too.
function span(variables) {
    return variables.request_id.slice(0, 16);
}

// Sets what the replica is sent. A client may say that it does not keep the trace; that it does is an administrator's to say, as
// others could fill the store.
function begin(r, trusted) {
    const variables = r.variables;
    const given = parse(variables.http_traceparent);
    const id = given ? given[0] : variables.request_id;
    const asked = given && Number(`0x${given[2]}`) % 2 === 1;
    const sampled = given && !asked ? false : asked && trusted || kept(id);
    variables.sampled = sampled ? '1' : '0';
    variables.traceparent = `00-${id}-${span(variables)}-0${variables.sampled}`;
    if (!given) {
        variables.tracestate = '';
    }
}

// The seconds in a list of Nginx' such as "0.001, - : 0.020".
function seconds(list) {
    return list ? list.split(/[,:]? /).filter((one) => one).map((one) => Number(one) || 0) : [];
}

// The request is over; `used` is {prompt, cached, completion} or null.
function end(r, chosen, used) {
    const variables = r.variables;
    if (!variables.sampled) {
        begin(r, false);
    }
    const failed = r.status >= 500 || r.cut;
    if (variables.sampled !== '1' && !failed) {
        return;
    }
    const now = Date.now();
    const took = Number(variables.request_time);
    const times = seconds(variables.upstream_response_time);
    const tried = variables.tried ? variables.tried.split(' ') : [];
    const given = parse(variables.http_traceparent);
    const attributes = {
        'http.request.method': r.method,
        'http.route': r.uri,
        'http.response.status_code': r.status,
        'gen_ai.operation.name': OPERATIONS[r.uri],
        'gen_ai.request.model': chosen.model || undefined,
        'gateway.request_id': variables.id,
        'gateway.key': variables.key || undefined,
        'gateway.replica': chosen.replica || undefined,
        'gateway.reason': chosen.reason,
        'gateway.tries': tried.length + (chosen.replica ? 1 : 0),
    };
    if (chosen.stream) {
        attributes['gen_ai.request.stream'] = true;
    }
    if (chosen.replica && times.length) {
        // Tries that failed before it are in this time.
        attributes['gateway.time_to_replica'] = Math.max(Math.round(1000 * (took - times[times.length - 1])), 0) / 1000;
    }
    if (variables.ttft !== 'null') {
        attributes['gen_ai.response.time_to_first_chunk'] = Number(variables.ttft);
    }
    if (used) {
        attributes['gen_ai.usage.input_tokens'] = used.prompt;
        attributes['gen_ai.usage.cache_read.input_tokens'] = used.cached;
        attributes['gen_ai.usage.output_tokens'] = used.completion;
    }
    if (failed) {
        attributes['error.type'] = r.cut ? 'stream_lost' : String(r.status);
    }
    // One try follows the other, and the last one ends with the request.
    let at = took;
    const events = tried.map((one) => one.split('=')).reverse().map(([replica, cause], i) => {
        at -= times[times.length - 1 - i - (chosen.replica ? 0 : 1)] || 0;
        return { at: Math.round(now - 1000 * (took - at)), name: 'retry', attributes: { 'gateway.replica': replica, 'gateway.cause': cause } };
    }).reverse();
    put(JSON.stringify({
        trace: variables.traceparent.slice(3, 35), span: span(variables), parent: given ? given[1] : '', name: `${r.method} ${r.uri}`,
        from: Math.round(now - 1000 * took), to: now, failed, attributes, events,
    }), span(variables));
}

// Queues a span, or loses it.
function put(text, id) {
    let waiting = 0;
    try {
        waiting = counters.incr('spans', 1, 0);
        if (waiting <= MOST) {
            shared.set(id, text);
            return;
        }
    } catch (e) {
        // There is no room; that is counted below.
    }
    if (waiting) {
        counters.incr('spans', -1, 0);
    }
    metrics.spans('lost', 1);
}

// ---- sending

// js_periodic, in one worker.
async function send() {
    if (settings.traces === null) {
        return;
    }
    const began = Date.now();
    while (Date.now() - began < TURN) {
        const texts = shared.keys(BATCH).map((id) => shared.pop(id)).filter((text) => text);
        if (!texts.length) {
            return;
        }
        counters.incr('spans', -texts.length, 0);
        let sent = false;
        try {
            const answer = await ngx.fetch(URL, { method: 'POST', headers: { 'Content-Type': TYPE }, body: encode(texts.map(JSON.parse)) });
            sent = answer.status === 200;
        } catch (e) {
            // Whoever looks for spans finds them counted; a store that is away is nobody's emergency.
            ngx.log(ngx.INFO, `traces: ${e.message}`);
        }
        metrics.spans(sent ? 'sent' : 'lost', texts.length);
        if (!sent) {
            return;
        }
    }
}

// ---- OTLP: https://github.com/open-telemetry/opentelemetry-proto, by the numbers of its fields

// A whole number that is not negative, seven bits a byte.
function varint(value) {
    const bytes = [];
    while (value > 127) {
        bytes.push(value % 128 + 128);
        value = Math.floor(value / 128);
    }
    return Buffer.from([...bytes, value]);
}

// A field of bytes, text, or a message in pieces.
function field(number, value) {
    const bytes = Array.isArray(value) ? Buffer.concat(value) : Buffer.from(value);
    return Buffer.concat([varint(number * 8 + 2), varint(bytes.length), bytes]);
}

function whole(number, value) {
    return Buffer.concat([varint(number * 8), varint(value)]);
}

// Nanoseconds of a time in milliseconds.
function time(number, ms) {
    const bytes = Buffer.alloc(8);
    const high = Math.floor(ms * 1e6 / 2 ** 32);
    bytes.writeUInt32LE(ms * 1e6 - high * 2 ** 32, 0);
    bytes.writeUInt32LE(high, 4);
    return Buffer.concat([varint(number * 8 + 1), bytes]);
}

function double(number, value) {
    const bytes = Buffer.alloc(8);
    bytes.writeDoubleLE(value, 0);
    return Buffer.concat([varint(number * 8 + 1), bytes]);
}

// Seconds stay seconds where they happen to be whole.
function value(name, is) {
    switch (typeof is) {
    case 'boolean':
        return whole(2, Number(is));
    case 'number':
        return name.includes('time_to') ? double(4, is) : whole(3, is);
    default:
        return field(1, is);
    }
}

function attributes(number, of) {
    return Object.keys(of).map((name) => field(number, [field(1, name), field(2, [value(name, of[name])])]));
}

function encode(spans) {
    const [SERVER, ERROR] = [2, 2];
    const resource = field(1, attributes(1, { 'service.name': 'gateway' }));
    const scope = field(1, [field(1, 'gateway')]);
    const encoded = spans.map((one) => field(2, [
        field(1, Buffer.from(one.trace, 'hex')), field(2, Buffer.from(one.span, 'hex')),
        ...one.parent ? [field(4, Buffer.from(one.parent, 'hex'))] : [],
        field(5, one.name), whole(6, SERVER), time(7, one.from), time(8, one.to), ...attributes(9, one.attributes),
        ...one.events.map((event) => field(11, [time(1, event.at), field(2, event.name), ...attributes(3, event.attributes)])),
        ...one.failed ? [field(15, [whole(3, ERROR)])] : [],
    ]));
    return field(1, [resource, field(2, [scope, ...encoded])]);
}

export default { begin, end, send, parse };
