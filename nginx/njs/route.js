// The choice of a replica for a request, and of the next one when it failed.

import answers from './answers.js';
import body from './body.js';
import budget from './budget.js';
import fleet from './fleet.js';
import keys from './keys.js';
import limits from './limits.js';
import load from './load.js';
import metrics from './metrics.js';
import policies from './policies.js';
import settings from './settings.js';
import usage from './usage.js';

const policy = policies[settings.policy];
const TRIES = 7;       // Nginx allows ten internal redirects, and a long body takes two
const DELIVERED = 2;   // replicas that one request may break

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

// Whether one model or more are served by all replicas whose models are known: then each may answer who names none.
function alike(table) {
    const known = table.replicas.filter((replica) => replica.models.length).length;
    return !known || Object.values(table.models).some((serving) => serving.length === known);
}

// `chosen` is what the log phase needs; it is nearer there than the variables are. `work`: the characters of its prompt that
// the replica has to compute.
function send(r, replica, model, reason, work, stream) {
    const name = replica.name;
    const variables = r.variables;
    variables.replica = name;
    variables.reason = reason;
    variables.work = work;
    if (stream) {
        variables.stream = '1';
    }
    r.chosen = { replica: name, model, reason, work, stream };
    fleet.enter(name, work);
}

// ---- refusing

function mark(r) {
    r.variables.reason = 'refused';
    r.chosen = { replica: '', model: r.variables.model || '', reason: 'refused' };
}

// `after` how many seconds to try again; `never`: not to.
function refuse(r, cause, status, code, message, param, after, never) {
    mark(r);
    metrics.refused(cause);
    if (never) {
        r.variables.no_retry = '1';
    }
    if (after || !never && (status === 429 || status === 503)) {
        r.headersOut['Retry-After'] = String(after || (status === 429 ? 1 : 5));
    }
    answers.send(r, status, code, message, param);
}

function refuseNone(r, table) {
    const tried = ` ${r.variables.tried || ''}`;
    const states = table.replicas.map(({ name, state }) => `${name} ${tried.includes(` ${name}=draining`) ? 'draining' : state}`);
    const loading = table.replicas.filter((replica) => replica.state === 'loading').length;
    refuse(r, 'none_ready', 503, 'no_replica_ready',
        `No replica can take this request: ${loading} of ${table.replicas.length} loading (${states.join(', ')}).`);
}

// The models that a holder may use.
function modelsFor(table, holder) {
    return Object.keys(table.models).filter((model) => keys.may(holder, model));
}

function refuseModel(r, table, model, holder) {
    if (table.untold) {
        refuseNone(r, table);
        return;
    }
    const names = modelsFor(table, holder);
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
        const holder = await keys.caller(r);
        if (holder.refused) {
            mark(r);
            keys.refuse(r, holder.refused);
            return;
        }
        const place = budget.take(r, holder.name);
        if (place === 'memory') {
            await pick(r, holder);
        } else if (place === 'disk') {
            r.internalRedirect('@long');
        } else {
            refuse(r, 'bodies', 429, 'bodies_full', `Too many bytes of ${place === 'share' ? `the key ${holder.name}'s ` : ''}other `
                + 'requests are on their way. Try again later.');
        }
    } catch (e) {
        undecided(r, e);
    }
}

// js_content of @long: Nginx has read the body by now, and left it in its file.
async function long(r) {
    try {
        // The key may have been withdrawn while the body came.
        const holder = await keys.caller(r);
        if (holder.refused) {
            mark(r);
            keys.refuse(r, holder.refused);
        } else if (await pick(r, holder)) {
            r.internalRedirect('@chosen');
        }
    } catch (e) {
        undecided(r, e);
    }
}

function undecided(r, e) {
    ngx.log(ngx.ERR, `choosing: ${e.message} ${e.stack}`);
    refuse(r, 'none_ready', 503, 'gateway_error', 'The gateway could not choose a replica.');
}

// Chooses a replica by what the body says, or refuses; says whether it chose.
async function pick(r, holder) {
    const asked = await body.read(r);
    if (asked.unreadable) {
        refuse(r, 'unknown_model', 400, 'model_unreadable', `The model of this upload can't be read for certain, because of ${
            asked.unreadable}.`, 'model');
        return false;
    }
    const model = asked.model;
    const table = fleet.table();
    const known = keys.may(holder, model) ? fleet.serving(table, model) : undefined;
    // Under whatever name, it is one cache.
    asked.model = table.names[model] || model;
    if (model && !known && (holder.models !== null || Object.keys(table.models).length)) {
        refuseModel(r, table, model, holder);
        return false;
    }
    if (!model && (holder.models !== null || !alike(table))) {
        refuse(r, 'unknown_model', 400, 'model_required', `No model could be read from this request. Name one of: ${
            modelsFor(table, holder).join(', ')}.`, 'model');
        return false;
    }
    // Most requests find the same replicas: those of a model are listed once for each table.
    const name = known ? model : '';
    const list = table.lists[name] || (table.lists[name] = candidates(table, known, null));
    if (!list.length) {
        refuseNone(r, table);
        return false;
    }
    if (known) {
        r.variables.model = model;
    }
    const wants = usage.wanted(asked.body);
    if (wants) {
        r.variables.wants = wants;
    }
    const many = usage.many(r.uri, asked.body);
    if (many) {
        r.variables.many = many;
    }
    const { refused } = limits.admit(r, holder, asked, name);
    if (refused) {
        refuse(r, refused.cause, refused.status, refused.code, refused.message, refused.param, refused.after, refused.never);
        return false;
    }
    if (list[0].state === 'ready') {
        const [replica, reason, work] = policy(list, asked, table.canary);
        send(r, replica, name, reason, work, asked.body.stream);
    } else {
        send(r, load.leastBusy(list), name, 'fallback', 0, asked.body.stream);
    }
    return true;
}

// What the last try added to one of $upstream_…: '0.001', or '-' where it never came so far.
function last(value) {
    return value === undefined ? '-' : value.slice(value.lastIndexOf(' ') + 1);
}

// Why the last try failed: the replica is full, or being stopped, or its engine failed, no connection, a timeout, or a
// connection that broke.
function cause(r) {
    const status = last(r.variables.upstream_status);
    if (last(r.variables.upstream_header_time) !== '-') {
        return status !== '503' ? 'failed' : r.variables.upstream_http_x_refusal === 'draining' ? 'draining' : 'refused';
    }
    if (last(r.variables.upstream_connect_time) === '-') {
        return 'connect';
    }
    return status === '504' ? 'timeout' : 'reset';
}

// A request that may have ended the replica it was sent to goes to one more, not to all in turn.
function again(r) {
    const failed = r.variables.replica;
    const why = cause(r);
    const work = Number(r.variables.work);
    fleet.leave(failed, work);
    r.variables.replica = '';
    metrics.retried(failed, why);
    if (why === 'connect') {
        fleet.unreachable(failed);
    } else if (why === 'failed') {
        fleet.answered(failed, 502);
    }
    const tried = `${r.variables.tried ? `${r.variables.tried} ` : ''}${failed}=${why}`;
    r.variables.tried = tried;
    const entries = tried.split(' ');
    const names = entries.map((entry) => entry.split('=')[0]);
    const broken = entries.filter((entry) => /=(reset|timeout|failed)$/.test(entry));
    const table = fleet.table();
    const model = r.variables.model || '';
    const list = candidates(table, fleet.serving(table, model), names);
    if (list.length && broken.length < DELIVERED && names.length < TRIES) {
        send(r, load.leastBusy(list), model, 'retry', work, r.variables.stream);
    } else if (broken.length) {
        const words = r.variables.upstream_http_x_failure;
        refuse(r, 'failed', 502, 'replica_failed', `This request failed on ${broken.join(' and on ').replace(/=/g, ': ')}`
            + `${words ? ` (${words})` : ''}. It is not tried again, as it may be the cause.`);
    } else if (tried.includes('=refused')) {
        refuse(r, 'full', 429, 'fleet_full', 'All replicas are full. Try again later.');
    } else {
        refuseNone(r, table);
    }
}

// js_access of @retry.
function retry(r) {
    try {
        again(r);
    } catch (e) {
        ngx.log(ngx.ERR, `trying again: ${e.message} ${e.stack}`);
        refuse(r, 'none_ready', 503, 'gateway_error', 'The gateway could not choose another replica.');
    }
}

// $done, in the log phase: counts the request out, however it ended. Never logs.
function done(r) {
    const variables = r.variables;
    budget.over(r);
    let chosen = r.chosen;
    // An error page in place of a replica's own answer (408, 413) has lost it; the variables stay.
    if (!chosen && variables.replica) {
        chosen = { replica: variables.replica, model: variables.model || '', reason: variables.reason, work: Number(variables.work) };
    }
    if (chosen) {
        let firstByte = NaN;
        if (chosen.replica) {
            fleet.leave(chosen.replica, chosen.work);
            fleet.answered(chosen.replica, r.status);
            firstByte = Number(last(variables.upstream_header_time));
        }
        const used = chosen.replica ? usage.used(r) : null;
        if (chosen.replica && (r.status === 200 || r.status === 499)) {
            usage.record(chosen.replica, variables.key || '', variables.end_user || '', chosen.model, used);
        }
        if (variables.taken) {
            // What came to nothing counts to no limit; a client that hung up is no refusal.
            const refused = !chosen.replica || r.status >= 400 && r.status !== 499;
            limits.settle(variables.taken, used, refused, firstByte >= 0, Number(variables.request_time));
        }
        metrics.served(chosen.replica, chosen.model, r.status, chosen.reason, firstByte, Number(variables.request_time));
    }
    return '';
}

// GET /v1/models and /v1/models/NAME: those of all replicas that the caller may use.
async function models(r) {
    if (r.method !== 'GET' && r.method !== 'HEAD') {
        answers.method(r, 'GET');
        return;
    }
    const holder = await keys.admitted(r);
    if (!holder) {
        return;
    }
    const table = fleet.table();
    const names = modelsFor(table, holder);
    const wanted = r.uri.slice('/v1/models/'.length);
    if (!wanted && (names.length || holder.models !== null)) {
        // All at once, however few a page of Anthropic's API should have.
        answers.json(r, {
            object: 'list', data: names.map(fleet.card), has_more: false, first_id: names[0], last_id: names[names.length - 1],
        });
    } else if (!wanted) {
        refuseNone(r, table);
    } else if (names.includes(wanted)) {
        answers.json(r, fleet.card(wanted));
    } else {
        refuseModel(r, table, wanted, holder);
    }
}

export default { choose, long, retry, done, models };
