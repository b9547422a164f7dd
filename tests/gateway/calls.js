// Lets a test call a function of a gateway's module inside real njs: POST {"module", "name", "arguments"} gives its value.

import fs from 'fs';
import answers from './answers.js';
import body from './body.js';
import budget from './budget.js';
import door from './door.js';
import ed25519 from './ed25519.js';
import fleet from './fleet.js';
import health from './health.js';
import keys from './keys.js';
import limits from './limits.js';
import metrics from './metrics.js';
import objectives from './objectives.js';
import prefix from './prefix.js';
import route from './route.js';
import settings from './settings.js';
import sleep from './sleep.js';
import stream from './stream.js';
import texts from './texts.js';
import timetable from './timetable.js';
import usage from './usage.js';

const TIMED = 5;   // ms: less than a busy host lets anybody run

// Whether a signature is one, and the milliseconds of a check; all in hex.
async function signatures(rows) {
    const began = Date.now();
    const found = [];
    for (const row of rows) {
        found.push(await ed25519.verify(...row.map((text) => Buffer.from(text, 'hex'))));
    }
    return [found, (Date.now() - began) / rows.length];
}

const MODULES = {
    answers, body, fleet, health, keys, limits, metrics, objectives, prefix, settings, sleep, stream, texts, timetable, usage,
};

// Passes chunks through stream.js as Nginx would; `lost` is the chunk at which the connection to the replica was lost.
function filtered(type, chunks, lost, uri, sent, wants) {
    let out = Buffer.alloc(0);
    const request = {
        headersOut: { 'Content-Type': type },
        uri: uri || '/v1/chat/completions',
        variables: { upstream_response_time: '-', replica: 'vllm-0', id: 'r1', bytes_sent: String(sent || 0), wants },
        sendBuffer(data, flags) {
            out = Buffer.concat([out, Buffer.from(data), Buffer.from(flags.last ? '<last>' : '')]);
        },
        done() {
            this.over = true;
        },
    };
    chunks.forEach((chunk, i) => {
        if (i === lost) {
            request.variables.upstream_response_time = '1.234';
        }
        const data = Buffer.from(chunk, 'base64');
        const flags = { last: lost < 0 && i === chunks.length - 1 };
        if (request.over) {
            request.sendBuffer(data, flags);
        } else {
            stream.pass(request, data, flags);
        }
    });
    budget.over(request.variables);
    return out.toString('base64');
}

// What is metered of a stream that came in these pieces of whole events, and the text that its client gets.
function metered(uri, many, pieces) {
    const request = { uri, variables: { many } };
    const passed = pieces.map((piece) => String(usage.events(request, Buffer.from(piece)))).join('');
    return { used: usage.used(request), passed };
}

// The characters of prompt that a replica still has to compute when a stream has begun, and after each of its pieces; `waiting`:
// what its header x-waiting says; `redirected`: an internal redirect has left the variables alone.
function toCompute(waiting, pieces, redirected) {
    const variables = { replica: 'counted', upstream_response_time: '-', bytes_sent: '0', upstream_http_x_waiting: waiting, stream: '1', work: '500' };
    const request = {
        uri: '/v1/responses', headersOut: { 'Content-Type': 'text/event-stream' }, variables, sendBuffer() {}, done() {},
        chosen: redirected ? undefined : { replica: 'counted', stream: true, work: 500 },
    };
    const left = () => fleet.number('counted') % fleet.REQUEST;
    fleet.enter('counted', 500);
    stream.begin(request);
    const found = [left()];
    for (const piece of pieces) {
        stream.pass(request, Buffer.from(piece), {});
        found.push(left());
    }
    fleet.leave('counted', left());
    return found;
}

// Publishes the fleet's table while another worker begins to, `times` times, and learns of another canary's share each time. Gives
// the share in the table, and how often it was made.
function overtaken(times) {
    const { readdirSync } = fs;
    const [{ name }] = fleet.read();
    let made = 0;
    fs.readdirSync = (folder) => {
        if (++made <= times) {
            ngx.shared.counters.incr('publishing', 1, 0);
            fleet.set('canary', { replicas: [name], share: made / 100 });
        }
        return readdirSync(folder);
    };
    try {
        return [fleet.publish().canary, fleet.table().canary, made];
    } finally {
        fs.readdirSync = readdirSync;
        ngx.shared.fleet.delete('canary');
        fleet.publish();
    }
}

// What limits.js says to so many requests of a holder, one after the other, at each of these times of a clock that stands: of each
// the refusal's code or '', seconds to try again after, and what the headers tell of tokens: left, until when. Each needs and uses
// 3 tokens of a prompt and 7 of an answer. And the hours that the clock on this host's wall shows then.
function clocked(holder, times, count) {
    const { now } = Date;
    const answers = [];
    try {
        for (const time of times) {
            Date.now = () => time;
            for (let i = 0; i < count; i++) {
                const request = { uri: '/v1/completions', headersIn: { 'Content-Length': '0' }, variables: {} };
                limits.enter(request, holder);
                // An internal redirect leaves the variables only.
                if (i % 3 === 1) {
                    delete request.reserved;
                }
                const { refused } = limits.admit(request, holder, { body: { prompt: [1, 2, 3], max_tokens: 7 } }, '');
                const { remaining_tokens: left, reset_tokens: reset } = request.variables;
                answers.push([refused ? refused.code : '', refused && refused.after || 0, left, reset]);
                if (i % 3) {
                    delete request.reserved;
                }
                limits.settle(request, { prompt: 3, completion: 7 }, false, true, 1);
            }
        }
    } finally {
        Date.now = now;
    }
    return [answers, times.map((time) => new Date(time).getHours())];
}

// Reads a body of this content type; its bytes come in base64.
async function read(type, data) {
    const bytes = Buffer.from(data, 'base64');
    const r = {
        uri: '/v1/completions',
        headersIn: { 'Content-Type': type, 'Content-Length': String(bytes.length) },
        variables: {},
        readRequestJSON: async () => JSON.parse(String(bytes)),
        readRequestArrayBuffer: async () => new Uint8Array(bytes).buffer,
    };
    let taken = null;
    try {
        taken = body.isPlain(type, bytes.length) ? await body.take(r, bytes.length) : null;
    } catch (e) {
        // as route.js has it
    }
    return taken && body.plain(r, bytes.length, taken) || await body.read(r);
}

// The cuts of a JSON body's prompt: [characters before it, what it is, its key].
async function cutsIn(data) {
    const { model, body: found } = await read('application/json', data);
    const prompt = prefix.cutsOf(found, model);
    return prompt.cuts.map((cut, i) => [Math.floor(cut / 4), cut % 4, prefix.key(prompt, i)]);
}

// The characters of prompt that the replicas have to compute of these bodies, in base64, which come at once.
async function chosen(bodies) {
    const requests = bodies.map((data) => {
        const bytes = Buffer.from(data, 'base64');
        const variables = { content_type: 'application/json', content_length: String(bytes.length), remote_addr: '192.0.2.1' };
        const readRequestArrayBuffer = async () => new Uint8Array(bytes).buffer;
        return { method: 'POST', uri: '/v1/chat/completions', headersIn: {}, headersOut: {}, variables, readRequestArrayBuffer };
    });
    await Promise.all(requests.map(route.choose));
    return requests.map(({ chosen: { replica, work }, variables }) => {
        fleet.leave(replica, work);
        budget.over(variables);
        return work;
    });
}

// What a module says is wrong with a file's text, or ''.
function complaint(module, text) {
    try {
        module.parse(text);
        return '';
    } catch (e) {
        return String(e.message);
    }
}

// The value of a function, and the milliseconds that it takes: the mean of as many runs as begin within TIMED ms, since the clock has
// whole ones.
async function timed(module, ...given) {
    const began = Date.now();
    let value, runs = 0, ms = 0;
    while (ms < TIMED) {
        value = module === 'body' ? await read(...given)
            : module === 'prefix' ? (prefix.cutsOf(...given), 0)
            : module === 'texts' ? texts.shortened(new Uint8Array(new Uint8Array(Buffer.from(...given)).buffer)).length
                : door.unfolded({ variables: { request_uri: given[0], host: 'a' }, headersIn: { Referer: given[0] } });
        runs++;
        ms = Date.now() - began;
    }
    return [value, ms / runs];
}

// Who is to sleep and who to wake, where these models are due.
function decided(replicas, after, due) {
    return sleep.decide(replicas, after, (model) => due.includes(model));
}

// What is wrong with a timetable, and of each of its models the minutes of the week, of those asked for, at which it is due.
function hours(text, minutes) {
    const { models, wrong } = timetable.parse(text);
    return [wrong, Object.keys(models).map((model) => [model, minutes.filter((minute) => timetable.has(models, model, minute))])];
}

async function call(r) {
    const asked = JSON.parse(await r.readRequestText());
    const value = asked.name === 'filtered' ? filtered(...asked.arguments)
        : asked.name === 'toCompute' ? toCompute(...asked.arguments)
        : asked.name === 'metered' ? metered(...asked.arguments)
        : asked.name === 'clocked' ? clocked(...asked.arguments)
        : asked.name === 'decided' ? decided(...asked.arguments)
        : asked.name === 'hours' ? hours(...asked.arguments)
        : asked.name === 'overtaken' ? overtaken(...asked.arguments)
        : asked.name === 'timed' ? await timed(asked.module, ...asked.arguments)
        : asked.name === 'read' ? await read(...asked.arguments)
        : asked.name === 'chosen' ? await chosen(...asked.arguments)
        : asked.name === 'cutsIn' ? await cutsIn(...asked.arguments)
        : asked.name === 'signatures' ? await signatures(...asked.arguments)
        : asked.name === 'complaint' ? complaint(MODULES[asked.module], ...asked.arguments)
        : asked.name === undefined ? MODULES[asked.module]
            : MODULES[asked.module][asked.name](...asked.arguments);
    r.return(200, JSON.stringify(value === undefined ? null : value));
}

export default { call };
