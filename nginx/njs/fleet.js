// The fleet as the gateway sees it: which replicas there are, what state each is in, how many requests it has in flight.
//
// health.js keeps a record of each replica in the shared dictionary `fleet`; `publish` makes of all records one table that
// every request reads. Requests in flight are counted in `load`, per replica, and per replica and worker, so that the
// count of a worker that was killed can be taken back.

import fs from 'fs';

const shared = ngx.shared.fleet;
const load = ngx.shared.load;
const counters = ngx.shared.counters;

const WORK_LEFT = Math.exp(-1 / 5);   // after a second: work counts for some five seconds

const ALL = 1e9;                      // keys; a shared dictionary gives 1,024 unless told otherwise
const ZONES = ['fleet', 'counters'];  // those whose writes may be lost: nothing is evicted from them

const worker = ` ${process.pid}`;   // asking for it costs more than counting

// Reads nginx/fleet/*.conf: one {name, host, weight} an upstream block, in the order of the files.
function read() {
    const folder = `${ngx.prefix}fleet/`;
    const replicas = [];
    for (const file of fs.readdirSync(folder).filter((name) => name.endsWith('.conf')).sort()) {
        replicas.push(...parse(fs.readFileSync(folder + file, 'utf8')));
    }
    return replicas;
}

// The upstream blocks of a fleet file's text.
function parse(text) {
    const replicas = [];
    for (const [, name, body] of text.replace(/#.*/g, '').matchAll(/\bupstream\s+(\S+)\s*\{([^}]*)\}/g)) {
        const server = /\bserver\s+([^\s;]+)([^;]*);/.exec(body);
        if (server) {
            const weight = /\bweight=(\d+)/.exec(server[2]);
            replicas.push({ name, host: server[1], weight: weight ? Number(weight[1]) : 1 });
        }
    }
    return replicas;
}

// A JSON value of the shared dictionary.
function get(key, otherwise) {
    const text = shared.get(key);
    return text === undefined ? otherwise : JSON.parse(text);
}

function set(key, value) {
    shared.set(key, JSON.stringify(value));
}

let told = -Infinity;

// A write found no room in this zone: that is counted, and logged once a second.
function lost(zone, e) {
    // Without room for anything new, what is there can still be added to: `publish` has made this counter.
    counters.incr(`lost|${zone}`, 1, 0);
    if (clock() - told > 1000) {
        told = clock();
        ngx.log(ngx.ERR, `the zone ${zone} is full, a write is lost (${e.message}): make it larger in conf.d/njs.conf`);
    }
}

// The last look at a replica (health.js).
function record(name) {
    return get(`look:${name}`, { alive: null, reason: 'not asked yet', models: [], cards: [], metrics: {} });
}

// [state, reason] of a replica, from the last look, the last one-token request, the last failed connection and the
// operator's word.
function stateOf(name, look) {
    const down = get(`down:${name}`);
    const probe = get(`probe:${name}`);
    if (down) {
        return ['unreachable', down.reason];
    }
    if (!look.alive) {
        return [look.alive === null ? 'unknown' : look.state, look.reason];
    }
    if (!probe) {
        return ['loading', 'has not answered a one-token request yet'];
    }
    if (!probe.ok) {
        return ['wedged', probe.reason];
    }
    if (shared.has(`drain:${name}`)) {
        return ['draining', 'drained by the operator'];
    }
    return ['ready', ''];
}

// Makes the table anew from all records, and returns it:
// {replicas: [{id, name, host, weight, state, reason, models, canary, suspect, metrics}], models: {model: [index]}, canary: its share or null}
function publish() {
    const ids = get('ids', {});
    const canary = get('canary', { share: null, replicas: [] });
    const table = { replicas: [], models: {}, canary: canary.share };
    read().forEach((replica, index) => {
        const look = record(replica.name);
        const [state, reason] = stateOf(replica.name, look);
        // Given up, maybe too soon: not asked yet, a failed connection, or so slow that it seems dead (`late`) or wedged. Where
        // nothing else is left, as while the others load, it is better to wait there than to be refused.
        const suspect = state === 'unknown' || state === 'wedged'
            || (look.alive || look.late) && (state === 'unreachable' || state === 'loading');
        // A replica keeps its number when others come and go: prefix.js remembers by number.
        ids[replica.name] = ids[replica.name] || Object.keys(ids).length % 255 + 1;
        table.replicas.push({
            id: ids[replica.name],
            name: replica.name,
            host: replica.host,
            weight: replica.weight,
            state,
            reason,
            models: look.models,
            canary: canary.replicas.includes(replica.name),
            suspect: suspect && !shared.has(`drain:${replica.name}`),
            metrics: look.metrics,
        });
        for (const model of look.models) {
            (table.models[model] = table.models[model] || []).push(index);
        }
    });
    started();
    ZONES.forEach((zone) => counters.add(`lost|${zone}`, 0));
    set('ids', ids);
    set('table', table);
    // After the table: who reads this number reads this table or a later one.
    counters.incr('table', 1, 0);
    return table;
}

let seen = 0;
let parsed = null;

// The table, and `lists`: what route.js made of it. It is read anew only when another one was published.
function table() {
    const number = counters.get('table');
    if (number === undefined) {
        publish();
        return table();
    }
    if (number !== seen) {
        parsed = get('table');
        parsed.lists = Object.create(null);
        seen = number;
    }
    return parsed;
}

// The indices of the replicas that serve this model, or undefined.
function serving(now, model) {
    return Object.hasOwn(now.models, model) ? now.models[model] : undefined;
}

// The time in milliseconds, for what is compared with a time noted earlier. It counts from the machine's start, so that a
// step of the wall clock does not keep a replica from being watched for hours.
function clock() {
    return Math.round(parseFloat(fs.readFileSync('/proc/uptime', 'utf8')) * 1000);
}

// When this gateway began, by `clock`; a reload does not count.
function started() {
    shared.add('started', String(clock()));
    return Number(shared.get('started'));
}

// A connection to the replica failed: it leaves the route at once; health.js brings it back.
function unreachable(name) {
    set(`down:${name}`, { reason: 'a connection failed', at: clock() });
    publish();
}

function enter(name) {
    load.incr(name, 1, 0);
    load.incr(name + worker, 1, 0);
}

function leave(name) {
    load.incr(name, -1, 0);
    load.incr(name + worker, -1, 0);
}

function inFlight(name) {
    return load.get(name) || 0;
}

// How many characters of prompt a replica was sent lately that it had not in its cache: what keeps it from new prompts.
function work(name) {
    return load.get(`work:${name}`) || 0;
}

function addWork(name, characters) {
    load.incr(`work:${name}`, characters, 0);
}

// Called once a second.
function ageWork(name) {
    load.set(`work:${name}`, work(name) * WORK_LEFT);
}

// A worker that was killed never counted its requests out.
function forgetDeadWorkers() {
    for (const key of load.keys(ALL)) {
        const [name, pid] = key.split(' ');
        if (pid && !fs.existsSync(`/proc/${pid}`)) {
            load.incr(name, -load.pop(key), 0);
        }
    }
}

export default {
    ALL, ZONES, read, parse, get, set, lost, record, publish, table, serving, clock, started, unreachable, enter, leave, inFlight,
    work, addWork, ageWork, forgetDeadWorkers,
};
