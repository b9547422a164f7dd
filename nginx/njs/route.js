// The choice of a replica for a request, and of the next one when it failed.

import fleet from './fleet.js';
import prefix from './prefix.js';
import metrics from './metrics.js';
import answers from './answers.js';
import settings from './settings.js';

const counters = ngx.shared.counters;
const popular = ngx.shared.popular;

const TRIES = 9;             // Nginx allows ten internal redirects
const BRACE = 123;           // {: every JSON body here begins so
const PARSED = 1 << 20;      // characters; of a longer body only the model is read

// How many requests a replica may have beyond the one with fewest, or how many times the mean, whichever is more …
const NEW = [1, 1.5];        // … and still be given a prompt that nobody has
const SOFT = [4, 1.25];      // … before a beginning that much of its work shares is given to another replica too
const HARD = [8, 2];         // … before all that comes goes elsewhere: affinity overloads nobody
const HOT = 3 / 4;           // of what a busy replica gets, begins alike: worth the room in another cache
const HOT_OF = 4;            // requests, at least, to judge by

const ANSWER = 1000;         // characters of prompt that take a replica about as long as its part in one answer
const ALIKE = 1.25;          // times the least work: no reason to prefer one replica to the other

// ---- reading the request

// {model, body}: what a body asks for. Bodies that are no JSON object give no model: the replica says what is wrong.
function read(r, text) {
    if (text.charCodeAt(0) !== BRACE && /^multipart\//.test(r.headersIn['Content-Type'])) {
        const field = /name="model"\r\n\r\n([^\r\n]*)/.exec(text);
        return { model: field ? field[1] : '', body: {} };
    }
    if (text.length > PARSED) {
        // Model and messages are near one of the two ends in every client's layout.
        const field = /^\s*\{\s*"model"\s*:\s*"([^"\\]*)"/.exec(text.slice(0, 512))
            || /,\s*"model"\s*:\s*"([^"\\]*)"\s*(?:,\s*"\w+"\s*:\s*(?:"[^"\\]*"|[\w.+-]+)\s*)*\}\s*$/.exec(text.slice(-512));
        if (field) {
            return { model: field[1], body: { prompt: text.slice(0, PARSED / 4) } };
        }
    }
    try {
        const body = JSON.parse(text);
        if (body && typeof body === 'object') {
            return { model: typeof body.model === 'string' ? body.model : '', body };
        }
    } catch (e) {
        // not JSON
    }
    return { model: '', body: {} };
}

// ---- choosing

// The replicas that may take the request: those ready; where there are none, those that may have been given up too soon.
function candidates(table, serving, tried) {
    const ready = [];
    const suspect = [];
    const count = serving ? serving.length : table.replicas.length;
    for (let i = 0; i < count; i++) {
        const replica = table.replicas[serving ? serving[i] : i];
        if (!tried || !tried.includes(replica.name)) {
            if (replica.state === 'ready') {
                ready.push(replica);
            } else if (replica.suspect) {
                suspect.push(replica);
            }
        }
    }
    return ready.length ? ready : suspect;
}

function leastBusy(list) {
    let best = list[0];
    let least = Infinity;
    // Ties go round.
    const start = list.length > 1 ? counters.incr('turn', 1, 0) : 0;
    for (let i = 0; i < list.length; i++) {
        const replica = list[(start + i) % list.length];
        const busy = fleet.inFlight(replica.name) / replica.weight;
        if (busy < least) {
            least = busy;
            best = replica;
        }
    }
    return best;
}

// How much each replica has in flight by its weight, the least and the mean.
function loads(list) {
    const busy = [];
    let least = Infinity;
    let sum = 0;
    for (let i = 0; i < list.length; i++) {
        const one = fleet.inFlight(list[i].name) / list[i].weight;
        busy.push(one);
        sum += one;
        if (one < least) {
            least = one;
        }
    }
    return { busy, least, mean: sum / list.length };
}

function limit(load, bound) {
    return Math.max(load.least + bound[0], load.mean * bound[1]);
}

function workOf(replica) {
    return fleet.work(replica.name) / replica.weight;
}

// For a prompt that nobody has: of those not too busy, and given about the least to compute lately, the next in turn.
// Going by the number of requests alone would send a burst of long prompts to one, and all that follow the end of one
// batch to where it was, to be the next batch and wait for each other: in turn they meet fewer others that begin.
function lightest(list, load) {
    const most = limit(load, NEW);
    const works = [];
    let least = Infinity;
    for (let i = 0; i < list.length; i++) {
        works[i] = load.busy[i] <= most ? workOf(list[i]) : Infinity;
        least = Math.min(least, works[i]);
    }
    let i = list.length > 1 ? counters.incr('new', 1, 0) % list.length : 0;
    while (works[i] > least * ALIKE) {
        i = (i + 1) % list.length;
    }
    return list[i];
}

// Whether the i-th replica is the better one of two that know the prompt: they are compared as those that do not.
function better(list, load, i, than) {
    const most = limit(load, NEW);
    return load.busy[i] > most || load.busy[than] > most ? load.busy[i] < load.busy[than]
        : workOf(list[i]) < workOf(list[than]);
}

// Counts a request to a busy replica; whether its beginning is one that many of them share. Sending it elsewhere then takes
// load off for good, while anything else would only push other prompts out of another replica's cache.
function hot(name, key) {
    const round = popular.get(`round ${name}`) || 0;
    const all = popular.incr(`${name} ${round}`, 1, 0);
    const alike = popular.incr(`${name} ${round} ${key}`, 1, 0);
    const yes = all >= HOT_OF && alike >= HOT * all;
    if (yes || all >= 8 * HOT_OF) {
        popular.set(`round ${name}`, round + 1);
    }
    return yes;
}

// The replica that was sent the longest beginning of this prompt, unless it has too much to do; null if there is none.
// `own`: only whole conversations count.
function byPrefix(list, load, prompt, own) {
    for (let at = prompt.cuts.length - 1; at >= 0; at--) {
        if (own && !(prompt.cuts[at] & prefix.OWN)) {
            continue;
        }
        const key = prefix.key(prompt, at);
        const packed = prompt.holders[at] = prefix.holders(key);
        let chosen = -1;
        for (let i = 0; packed && i < list.length; i++) {
            if (prefix.holds(packed, list[i].id) && (chosen < 0 || better(list, load, i, chosen))) {
                chosen = i;
            }
        }
        if (chosen >= 0 && load.busy[chosen] <= limit(load, HARD)) {
            if (!own && load.busy[chosen] > limit(load, SOFT) && hot(list[chosen].name, key)) {
                return null;
            }
            prompt.at = at;
            return list[chosen];
        }
    }
    return null;
}

// The replica is sent this prompt now. What comes before the match it was sent already.
function remember(prompt, replica) {
    const end = prompt.cuts.length - 1;
    const at = prompt.at;
    for (let i = Math.max(0, at); i <= end; i++) {
        // The end is set each time, so that what is in use stays.
        if (prompt.cuts[i] & prefix.KEPT && (i !== at || i === end)) {
            const key = prefix.key(prompt, i);
            prefix.keep(key, replica.id, prompt.holders[i] === undefined ? prefix.holders(key) : prompt.holders[i]);
        }
    }
    metrics.blocks(at + 1, end - at);
    const unknown = (prompt.cuts[end] - (at < 0 ? 0 : prompt.cuts[at])) / 4;
    fleet.addWork(replica.name, unknown + ANSWER);
}

// A session stays where it was; a new one, or one whose replica is gone, begins where its prompt fits best.
function bySession(table, list, prompt, key) {
    const packed = prefix.holders(key);
    let replica = list.find((one) => packed % 256 === one.id);
    const reason = replica ? 'session' : 'load';
    if (!replica) {
        list = table.canary === null ? list : group(list, table.canary);
        const load = loads(list);
        replica = prompt && byPrefix(list, load, prompt, false) || lightest(list, load);
    }
    prefix.keep(key, replica.id, 0);
    if (prompt) {
        remember(prompt, replica);
    }
    return [replica, reason];
}

// The canary's share of new conversations: which group of replicas takes one that begins now.
function group(list, share) {
    const canary = list.filter((replica) => replica.canary);
    const others = list.filter((replica) => !replica.canary);
    if (!canary.length || !others.length) {
        return list;
    }
    return Math.random() < share ? canary : others;
}

function pick(r, table, list, body, model) {
    const policy = settings.policy;
    if (policy === 'round_robin') {
        return [list[counters.incr('turn', 1, 0) % list.length], 'turn'];
    }
    const prompt = policy === 'prefix' ? prefix.cutsOf(body, model) : null;
    const session = policy !== 'least_busy' && (r.headersIn['X-Session-Id'] || body.prompt_cache_key);
    if (session) {
        return bySession(table, list, prompt, `session ${model} ${session}`);
    }
    if (!prompt) {
        return [leastBusy(table.canary === null ? list : group(list, table.canary)), 'load'];
    }
    let load = loads(list);
    let replica = byPrefix(list, load, prompt, table.canary !== null);
    if (!replica && table.canary !== null) {
        list = group(list, table.canary);
        load = loads(list);
        replica = byPrefix(list, load, prompt, false);
    }
    const reason = replica ? 'prefix' : 'load';
    replica = replica || lightest(list, load);
    remember(prompt, replica);
    return [replica, reason];
}

// `chosen` is what the log phase needs; it is nearer there than the variables are.
function send(r, replica, model, reason) {
    const name = replica.name;
    const variables = r.variables;
    variables.replica = name;
    variables.reason = reason;
    r.chosen = { replica: name, model, reason };
    fleet.enter(name);
}

// ---- refusing

function refuse(r, cause, status, code, message, param) {
    r.variables.reason = 'refused';
    r.chosen = { replica: '', model: r.variables.model || '', reason: 'refused' };
    metrics.refused(cause);
    if (status !== 404) {
        r.headersOut['Retry-After'] = status === 429 ? '1' : '5';
    }
    answers.send(r, status, code, message, param);
}

function refuseNone(r, table) {
    const states = table.replicas.map((replica) => `${replica.name} ${replica.state}`);
    const loading = table.replicas.filter((replica) => replica.state === 'loading').length;
    refuse(r, 'none_ready', 503, 'no_replica_ready',
        `No replica can take this request: ${loading} of ${table.replicas.length} loading (${states.join(', ')}).`);
}

function refuseModel(r, table, model) {
    const names = Object.keys(table.models);
    refuse(r, 'unknown_model', 404, 'model_not_found',
        `The model '${model.slice(0, 200)}' does not exist here. There are: ${names.join(', ')}.`, 'model');
}

// ---- what Nginx calls

// js_access of every location that a replica answers.
async function choose(r) {
    try {
        if (r.method !== 'POST') {
            answers.method(r, 'POST');
            return;
        }
        if (settings.closed) {
            refuse(r, 'closed', 401, 'no_keys', settings.closed);
            return;
        }
        const { model, body } = read(r, await r.readRequestText() || '');
        const table = fleet.table();
        const known = fleet.serving(table, model);
        if (model && !known && !table.replicas.some((replica) => !replica.models.length)) {
            refuseModel(r, table, model);
            return;
        }
        // Most requests find the same replicas: those of a model are listed once for each table.
        const name = known ? model : '';
        const list = table.lists[name] || (table.lists[name] = candidates(table, known, null));
        if (!list.length) {
            refuseNone(r, table);
            return;
        }
        if (known) {
            r.variables.model = model;
        }
        if (list[0].state === 'ready') {
            const [replica, reason] = pick(r, table, list, body, model);
            send(r, replica, name, reason);
        } else {
            send(r, leastBusy(list), name, 'fallback');
        }
    } catch (e) {
        ngx.log(ngx.ERR, `choosing: ${e.message} ${e.stack}`);
        refuse(r, 'none_ready', 503, 'gateway_error', 'The gateway could not choose a replica.');
    }
}

// What the last try added to one of $upstream_…: '0.001', or '-' where it never came so far.
function last(value) {
    return value === undefined ? '-' : value.slice(value.lastIndexOf(' ') + 1);
}

// Why the last try failed: the replica refused it, no connection, a timeout, or a connection that broke.
function cause(r) {
    if (last(r.variables.upstream_header_time) !== '-') {
        return 'refused';
    }
    if (last(r.variables.upstream_connect_time) === '-') {
        return 'connect';
    }
    return last(r.variables.upstream_status) === '504' ? 'timeout' : 'reset';
}

// js_access of @retry.
function retry(r) {
    const failed = r.variables.replica;
    const why = cause(r);
    fleet.leave(failed);
    r.variables.replica = '';
    metrics.retried(failed, why);
    if (why === 'connect') {
        fleet.unreachable(failed);
    }
    const tried = `${r.variables.tried ? `${r.variables.tried} ` : ''}${failed}=${why}`;
    r.variables.tried = tried;
    const names = tried.split(' ').map((entry) => entry.split('=')[0]);
    const table = fleet.table();
    const model = r.variables.model || '';
    const list = candidates(table, fleet.serving(table, model), names);
    if (list.length && names.length < TRIES) {
        send(r, leastBusy(list), model, 'retry');
    } else if (tried.includes('=refused')) {
        refuse(r, 'full', 429, 'fleet_full', 'All replicas are full. Try again later.');
    } else {
        refuseNone(r, table);
    }
}

// $done, in the log phase: counts the request out, however it ended. Always logs.
function done(r) {
    const chosen = r.chosen;
    if (chosen) {
        const variables = r.variables;
        let firstByte = NaN;
        if (chosen.replica) {
            fleet.leave(chosen.replica);
            firstByte = Number(last(variables.upstream_header_time));
        }
        metrics.served(chosen.replica, chosen.model, r.status, chosen.reason, firstByte, Number(variables.request_time));
    }
    return '1';
}

// GET /v1/models and /v1/models/NAME: those of all replicas.
function models(r) {
    if (r.method !== 'GET' && r.method !== 'HEAD') {
        answers.method(r, 'GET');
        return;
    }
    const table = fleet.table();
    const names = Object.keys(table.models);
    const wanted = r.uri.slice('/v1/models/'.length);
    if (!wanted && names.length) {
        answers.json(r, { object: 'list', data: names.map(fleet.card) });
    } else if (!wanted) {
        refuseNone(r, table);
    } else if (fleet.serving(table, wanted)) {
        answers.json(r, fleet.card(wanted));
    } else {
        refuseModel(r, table, wanted);
    }
}

export default { choose, retry, done, models, read, byPrefix };
