// Triton, a server beside the replicas, in its own words: KServe's version 2 by HTTP and by gRPC, for the same keys, with the
// same limits and counts.
//
// A request for text is read here and written anew, so that Triton gets what was checked, and says how many tokens it used.
// What of that the client did not ask for is taken out of the answer. The messages of gRPC are not read: whoever has a limit that
// only reading them could keep has to come by HTTP.

import answers from './answers.js';
import budget from './budget.js';
import fleet from './fleet.js';
import keys from './keys.js';
import limits from './limits.js';
import metrics from './metrics.js';
import route from './route.js';
import settings from './settings.js';
import stream from './stream.js';
import trace from './trace.js';

const [TRITON, CANARY] = fleet.TRITONS;
const LARGEST = 1 << 20;         // bytes of a body: client_max_body_size of its location
const ANSWER = 1 << 22;          // bytes of a whole answer that is read; a larger one passes as it is, and its tokens are not known
const MODEL = /^\/v2\/models\/([^/]+)/;
const COUNTS = { return_num_input_tokens: 'num_input_tokens', return_num_output_tokens: 'num_output_tokens' };
const FLAGS = ['stream', 'exclude_input_in_output', 'return_finish_reason', 'return_cumulative_logprob', 'return_logprobs']
    .concat(Object.keys(COUNTS));
const FIELDS = ['text_input', 'parameters', 'sampling_parameters'].concat(FLAGS);
const SERVER = /Server(Live|Ready|Metadata)$/;

// Which Triton takes a request: the canary its share, as with replicas.
function chosen() {
    const { replicas, share } = fleet.get('canary', { replicas: [], share: 0 });
    return replicas.includes(CANARY) && Math.random() < share ? CANARY : TRITON;
}

function send(r, name, reason, model, streams) {
    r.variables.triton = name;
    r.variables.replica = name;
    r.variables.reason = reason;
    r.chosen = { replica: name, model, reason, work: 0, stream: streams };
    fleet.enter(name, 0);
}

// ---- reading a request

function isObject(value) {
    return value !== null && typeof value === 'object' && !Array.isArray(value);
}

// The JSON value of a text, or undefined.
function parse(text) {
    try {
        return JSON.parse(text);
    } catch (e) {
        return undefined;
    }
}

// What a body asks for: {body: what Triton gets, asked: the sampling parameters, wants: the counts that the client wants}, or
// {wrong: what is wrong with it}.
function read(text) {
    const given = parse(text);
    if (!isObject(given)) {
        return { wrong: 'The body is no JSON object.' };
    }
    const unknown = Object.keys(given).find((name) => !FIELDS.includes(name));
    if (unknown !== undefined) {
        return { wrong: `There is no field ${unknown.slice(0, 100)} here: there are ${FIELDS.join(', ')}; sampling parameters belong `
            + 'into parameters.' };
    }
    if (typeof given.text_input !== 'string') {
        return { wrong: 'text_input has to be a text.' };
    }
    // Triton takes what stands in parameters by the name of an input for that input; NVIDIA's examples have stream there.
    const inside = isObject(given.parameters) ? FLAGS.filter((name) => given.parameters[name] !== undefined) : [];
    const twice = inside.find((name) => given[name] !== undefined);
    if (twice) {
        return { wrong: `${twice} is in the body and in parameters: leave one out.` };
    }
    inside.forEach((name) => {
        given[name] = given.parameters[name];
        delete given.parameters[name];
    });
    const flag = FLAGS.find((name) => given[name] !== undefined && typeof given[name] !== 'boolean');
    if (flag) {
        return { wrong: `${flag} has to be true or false.` };
    }
    const { parameters, sampling_parameters: other } = given;
    if (parameters !== undefined && other !== undefined) {
        return { wrong: 'Of parameters and sampling_parameters only one may be there.' };
    }
    if (other !== undefined && typeof other !== 'string') {
        return { wrong: 'sampling_parameters has to be a text that holds a JSON object.' };
    }
    const asked = other === undefined ? parameters ?? {} : parse(other);
    if (!isObject(asked)) {
        return { wrong: `${other === undefined ? 'parameters' : 'sampling_parameters'} has to be a JSON object.` };
    }
    // vLLM takes none for as many as there is room for, and a missing one for 16: nobody means the first by accident.
    if (asked.max_tokens === null) {
        return { wrong: 'max_tokens has to be a whole number.' };
    }
    const body = Object.assign({}, given);
    // What was checked is what counts: a name may stand there twice.
    if (other !== undefined) {
        body.sampling_parameters = JSON.stringify(asked);
    }
    Object.keys(COUNTS).forEach((name) => { body[name] = true; });
    return { body, asked, wants: Object.keys(COUNTS).filter((name) => given[name]).map((name) => COUNTS[name]).join(' ') };
}

function refuse(r, status, cause, code, message, param) {
    route.refuse(r, cause, status, code, message, param);
}

function refuseModel(r, model) {
    refuse(r, 404, 'unknown_model', 'model_not_found', `There is no model ${model} for this key.`);
}

// The holder whose place is taken, or null where it is not let in and has its answer.
async function entered(r) {
    const holder = await keys.caller(r);
    if (holder.refused) {
        route.mark(r);
        keys.refuse(r, holder.refused);
        return null;
    }
    const refused = holder.name && limits.enter(r, holder).refused;
    if (refused) {
        route.refuseLimit(r, refused);
        return null;
    }
    return holder;
}

// ---- what Nginx calls

// js_access of …/generate and …/generate_stream.
async function generate(r) {
    if (r.method !== 'POST') {
        answers.method(r, 'POST');
        return;
    }
    const holder = await entered(r);
    if (!holder) {
        return;
    }
    const length = Number(r.headersIn['Content-Length'] ?? NaN);
    if (!(length <= LARGEST)) {
        refuse(r, 411, 'invalid', 'length_required', 'The request needs the header Content-Length.');
        return;
    }
    if (budget.take(r, holder.name, String(length)) !== 'memory') {
        refuse(r, 429, 'bodies', 'bodies_full', 'Too many bytes of other requests are on their way. Try again later.');
        return;
    }
    const text = await r.readRequestText() || '';
    const model = MODEL.exec(r.uri)[1];
    if (!keys.may(holder, model)) {
        refuseModel(r, model);
        return;
    }
    const found = read(text);
    const streams = r.uri.endsWith('_stream');
    // Triton says that it gives one answer only, but with status 200, when the second one comes.
    const wrong = found.wrong || (found.body.stream && !streams ? 'generate gives one whole answer: leave stream out, or ask '
        + 'generate_stream.' : '');
    if (wrong) {
        refuse(r, 400, 'invalid', 'invalid_request', wrong);
        return;
    }
    const { asked, wants } = found;
    // They mean what they mean in the API whose sampling parameters these are.
    const sized = { as: '/v1/completions', body: { max_tokens: asked.max_tokens, n: asked.n, best_of: asked.best_of } };
    const refused = holder.name && limits.admit(r, holder, sized, '').refused;
    if (refused) {
        route.refuseLimit(r, refused);
        return;
    }
    if (settings.traces !== null) {
        trace.begin(r, holder.role === 'admin');
    }
    const variables = r.variables;
    variables.model = model;
    variables.wants = wants;
    variables.rewritten = JSON.stringify(found.body);
    if (streams) {
        variables.stream = '1';
    }
    send(r, chosen(), 'triton', model, streams);
}

// js_access of @triton: the other one, where this one can't be reached; a request that may have ended it goes nowhere else.
function again(r) {
    const variables = r.variables;
    const failed = variables.replica;
    const why = route.cause(r);
    left(r);
    metrics.retried(failed, why);
    const other = failed === CANARY ? TRITON : fleet.get('canary', { replicas: [] }).replicas.includes(CANARY) ? CANARY : '';
    if (why === 'connect' && other && !variables.tried) {
        variables.tried = `${failed}=${why}`;
        send(r, other, 'retry', variables.model, variables.stream);
    } else if (why === 'connect') {
        away(r);
    } else {
        refuse(r, 502, 'failed', 'replica_failed', `This request failed on ${failed}: ${why}.`);
    }
}

// error_page of what else Triton answers.
function away(r) {
    const variables = r.variables;
    const words = 'Triton does not answer: it is loading, or COMPOSE_PROFILES in .env does not name triton.';
    if (variables.reason) {
        left(r);
        refuse(r, 503, 'none_ready', 'no_triton', words);
    } else {
        // A look is no request that the gateway counts.
        r.headersOut['Retry-After'] = '5';
        answers.send(r, 503, 'no_triton', words);
    }
}

// The request is not at its Triton any more.
function left(r) {
    const variables = r.variables;
    if (variables.replica) {
        fleet.leave(variables.replica, 0);
        variables.replica = '';
    }
}

// js_access of health, metadata and the repository's index.
async function look(r) {
    const method = r.uri === '/v2/repository/index' ? 'POST' : 'GET';
    if (r.method !== method) {
        answers.method(r, method);
        return;
    }
    const holder = await keys.admitted(r);
    const [, model] = MODEL.exec(r.uri) || [];
    if (holder && model !== undefined && !keys.may(holder, model)) {
        refuseModel(r, model);
    } else if (holder) {
        r.models = holder.models;
        r.variables.triton = TRITON;
    }
}

// What of a holder's limits is kept by reading requests; '' if nothing.
function unread(r, holder) {
    const own = Object.keys(holder.limits);
    if (r.variables.end_user) {
        own.push(...Object.keys(JSON.parse(ngx.shared.keys.get('end_users') || '{}')));
    }
    return own.concat(holder.models === null ? [] : ['models']).join(', ');
}

// js_access of gRPC.
async function call(r) {
    const looks = SERVER.test(r.uri);
    const holder = looks ? await keys.admitted(r) : await entered(r);
    if (!holder) {
        return;
    }
    const held = looks ? '' : unread(r, holder);
    if (held) {
        refuse(r, 403, 'limit', 'grpc_unread', `The key ${holder.name} has limits (${held}) that the gateway can't keep for gRPC, whose `
            + 'messages it does not read: use HTTP.');
    } else if (r.uri.endsWith('Infer')) {
        send(r, chosen(), 'triton', '', false);
    } else {
        r.variables.triton = TRITON;
    }
}

// ---- answers

// Adds up what an answer's text says of tokens, and gives it as the client wants it; null where it is no answer.
function stripped(r, text) {
    const answer = parse(text);
    if (!isObject(answer)) {
        return null;
    }
    const told = answer.num_output_tokens;
    if (told === undefined) {
        return text;
    }
    r.made = (r.made || 0) + (Array.isArray(told) ? told.reduce((sum, one) => sum + one, 0) : told);
    r.usage = JSON.stringify({ prompt_tokens: answer.num_input_tokens, completion_tokens: r.made });
    r.extra = r.extra || Object.values(COUNTS).filter((name) => !(r.variables.wants || '').includes(name));
    r.extra.forEach((name) => { delete answer[name]; });
    return JSON.stringify(answer);
}

// The same of whole events.
function events(r, bytes) {
    return Buffer.from(bytes.toString().replace(/^data: (\{.*\})$/gm, (line, text) => `data: ${stripped(r, text) ?? text}`));
}

// js_header_filter
function begin(r) {
    r.rewrite = events;
    stream.begin(r);
    shorten(r);
}

// js_header_filter: a whole answer changes its length.
function shorten(r) {
    if (r.status === 200 && !isStream(r)) {
        delete r.headersOut['Content-Length'];
    }
}

function isStream(r) {
    return (r.headersOut['Content-Type'] || '').startsWith('text/event-stream');
}

// js_body_filter
function pass(r, data, flags) {
    if (r.status !== 200 || isStream(r)) {
        stream.pass(r, data, flags);
    } else {
        whole(r, data, flags, stripped);
    }
}

// js_body_filter of the repository's index: the models that the caller may use.
function list(r, data, flags) {
    whole(r, data, flags, (_, text) => {
        const found = parse(text);
        return r.models && Array.isArray(found) ? JSON.stringify(found.filter(({ name }) => r.models.includes(name))) : text;
    });
}

// Passes on a whole answer as `change` makes it.
function whole(r, data, flags, change) {
    const held = r.held || [];
    r.size = (r.size || 0) + data.length;
    held.push(Buffer.from(data));
    if (!flags.last && r.size <= ANSWER) {
        r.held = held;
        return;
    }
    const all = Buffer.concat(held);
    r.held = [];
    r.sendBuffer(flags.last && r.size <= ANSWER ? Buffer.from(change(r, all.toString()) ?? all) : all, flags);
}

export default { generate, again, away, look, call, begin, pass, shorten, list, read };
