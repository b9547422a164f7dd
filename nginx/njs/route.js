// The choice of a replica for a request, and of the next one when it failed.

import answers from './answers.js';
import body from './body.js';
import budget from './budget.js';
import fleet from './fleet.js';
import keys from './keys.js';
import limits from './limits.js';
import load from './load.js';
import metrics from './metrics.js';
import misses from './misses.js';
import policies from './policies.js';
import settings from './settings.js';
import trace from './trace.js';
import usage from './usage.js';

const policy = policies[settings.policy];
const TRIES = 7;       // Nginx allows ten internal redirects, and a long body takes two
const DELIVERED = 2;   // replicas that one request may break

// ---- choosing

// The replicas that may take the request: those ready; where there are none, those that sleep and wake for it; else those that may
// have been given up too soon.
function candidates(table, serving, tried) {
    const ready = [];
    const asleep = [];
    const suspect = [];
    const count = serving ? serving.length : table.replicas.length;
    for (let i = 0; i < count; i++) {
        const replica = table.replicas[serving ? serving[i] : i];
        if (!tried || !tried.includes(replica.name)) {
            if (replica.state === 'ready') {
                ready.push(replica);
            } else if (replica.state === 'asleep') {
                asleep.push(replica);
            } else if (replica.suspect) {
                suspect.push(replica);
            }
        }
    }
    return ready.length ? ready : asleep.length ? asleep : suspect;
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
    if (replica.on) {
        variables.replica_host = replica.on;
    }
    variables.reason = reason;
    // A number would cost three times as much as its text does.
    variables.work = String(work);
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

function refuseLimit(r, { cause, status, code, message, param, after, never }) {
    refuse(r, cause, status, code, message, param, after, never);
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
        // Each await costs as much as choosing among two replicas, so there is none without need.
        let holder = keys.caller(r);
        if (holder.then) {
            holder = await holder;
        }
        if (holder.refused) {
            mark(r);
            keys.refuse(r, holder.refused);
            return;
        }
        // Who has no key has no limits.
        const refused = holder.name && limits.enter(r, holder).refused;
        if (refused) {
            refuseLimit(r, refused);
            return;
        }
        const variables = r.variables;
        const length = variables.content_length;
        const place = budget.take(r, holder.name, length);
        if (place === 'memory') {
            let taken = null;
            try {
                taken = body.isPlain(variables.content_type, length) ? await body.take(r, length) : null;
            } catch (e) {
                // It is no JSON as JavaScript knows it.
            }
            pick(r, holder, taken && body.plain(r, length, taken) || await body.read(r));
        } else if (place === 'disk') {
            r.internalRedirect('@long');
        } else {
            const whose = place === 'full' ? '' : holder.name ? `the key ${holder.name}'s ` : "this address's ";
            refuse(r, 'bodies', 429, 'bodies_full', `Too many bytes of ${whose}other requests are on their way. Try again later.`);
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
        } else if (pick(r, holder, await body.read(r))) {
            r.variables.expected = r.chosen.expected || 0;
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

// Chooses a replica by what the body asks for, or refuses; says whether it chose.
function pick(r, holder, asked) {
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
    if (settings.gateways > 1) {
        asked.several = true;
    }
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
    if (asked.body.stream) {
        const wants = usage.wanted(asked.body);
        if (wants) {
            r.variables.wants = wants;
        }
    }
    const many = usage.many(r.uri, asked.body);
    if (many > 1 || many && asked.body.stream) {
        r.variables.many = many;
    } else {
        r.one = true;
    }
    const refused = holder.name && limits.admit(r, holder, asked, name).refused;
    if (refused) {
        refuseLimit(r, refused);
        return false;
    }
    if (settings.traces !== null) {
        trace.begin(r, holder.role === 'admin');
    }
    if (list[0].state === 'ready') {
        // A canary's share is of all that comes.
        const share = table.canary === null ? limits.shareOf(list, holder, name) : list;
        // To take an array apart by a pattern costs more than to look into it.
        const choice = policy(share, asked, table.canary);
        send(r, choice[0], name, choice[1], choice[2], asked.body.stream);
        r.chosen.expected = asked.expected;
    } else {
        send(r, load.leastBusy(list), name, list[0].state === 'asleep' ? 'wake' : 'fallback', 0, asked.body.stream);
    }
    return true;
}

// What the last try added to one of $upstream_…: '0.001', or '-' where it never came so far.
function last(value) {
    return value === undefined ? '-' : value.slice(value.lastIndexOf(' ') + 1);
}

// What a replica says that refuses with 503, if it is not full. The link to another host says that no connection came about.
const REFUSALS = { unreachable: 'connect', draining: 'draining', asleep: 'asleep' };

// Why the last try failed: the replica is full, or being stopped, or asleep, or its engine failed, no connection, a timeout, or a
// connection that broke.
function cause(r, failed) {
    const status = last(r.variables.upstream_status);
    const { sleep } = fleet.record(failed);
    if (last(r.variables.upstream_header_time) !== '-') {
        return status !== '503' ? 'failed' : REFUSALS[r.variables.upstream_http_x_refusal] || 'refused';
    }
    if (last(r.variables.upstream_connect_time) === '-') {
        return 'connect';
    }
    // It ended before it was awake: no request is to blame.
    if (sleep && sleep.state !== 'awake') {
        return 'asleep';
    }
    return status === '504' ? 'timeout' : 'reset';
}

// Of these replicas those on other hosts than the one that failed, where there are any: a host ends with all it has.
function elsewhere(table, list, failed, why) {
    const one = table.replicas.find((replica) => replica.name === failed);
    const others = one && why !== 'refused' && why !== 'draining' ? list.filter(({ on }) => on !== one.on) : [];
    return others.length ? others : list;
}

// A request that may have ended the replica it was sent to goes to one more, not to all in turn.
function again(r) {
    const failed = r.variables.replica;
    const why = cause(r, failed);
    const work = Number(r.variables.work);
    fleet.leave(failed, work);
    r.variables.replica = '';
    r.variables.replica_host = '';
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
    // Who has waited for one to wake does not wait for another.
    const list = elsewhere(table, candidates(table, fleet.serving(table, model), names), failed, why)
        .filter(({ state }) => why !== 'asleep' || state === 'ready');
    if (list.length && broken.length < DELIVERED && names.length < TRIES) {
        send(r, load.leastBusy(list), model, 'retry', work, r.variables.stream);
    } else if (why === 'asleep') {
        const words = r.variables.upstream_http_x_failure || 'it ended before it was awake';
        refuse(r, 'asleep', 503, 'model_asleep', `The model is asleep and did not wake in time (${failed}: ${
            words}). Try again later.`);
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
    const status = r.status;
    const seconds = Number(variables.request_time);
    const key = variables.key || '';
    budget.over(variables);
    let used = null;
    let firstByte = NaN;
    let chosen = r.chosen;
    // An error page in place of a replica's own answer (408, 413) has lost it; the variables stay.
    if (!chosen && variables.replica) {
        chosen = {
            replica: variables.replica, model: variables.model || '', reason: variables.reason, work: Number(variables.work),
            expected: Number(variables.expected),
        };
    }
    if (chosen) {
        const replica = chosen.replica;
        used = replica ? usage.used(r) : null;
        if (replica) {
            fleet.leave(replica, chosen.work);
            fleet.answered(replica, status);
            firstByte = Number(variables.upstream_header_time);
            if (Number.isNaN(firstByte)) {
                // of several tries
                firstByte = Number(last(variables.upstream_header_time));
            }
            if (status === 200 || status === 499) {
                usage.record(replica, key, key && variables.end_user || '', chosen.model, used);
                if (used && chosen.expected > 0) {
                    misses.record(variables.program, key, chosen.model, chosen.expected, used);
                }
            }
        }
        if (used) {
            variables.prompt_tokens = String(used.prompt);
            variables.cached_tokens = String(used.cached);
            variables.completion_tokens = String(used.completion);
        }
        metrics.served(replica, chosen.model, status, chosen.reason, firstByte, seconds);
        if (settings.traces !== null) {
            trace.end(r, chosen, used);
        }
    }
    // What came to nothing counts to no limit; a client that hung up is no refusal, but where its body never came.
    const refused = !chosen || !chosen.replica || status >= 400 && status !== 499;
    // Who has no key has no limits.
    if (key) {
        limits.settle(r, used, refused, firstByte >= 0, seconds);
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

export default { choose, long, retry, done, models, mark, refuse, refuseLimit, cause };
