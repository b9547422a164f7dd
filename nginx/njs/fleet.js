// The fleet as the gateway sees it: which replicas there are, what state each is in, how many requests it has in flight.
//
// health.js keeps a record of each replica in the shared dictionary `fleet`; `publish` makes of all records one table that
// every request reads. What grows with the number of models lies apart, so that it can't take the room of a replica's state:
// the names in `models`, one list a replica, and their cards in `cards`. Requests in flight and what they wait for are counted in `load`, per replica,
// and per replica and worker, so that the count of a worker that was killed can be taken back.

import fs from 'fs';

const shared = ngx.shared.fleet;
const models = ngx.shared.models;
const cards = ngx.shared.cards;
const load = ngx.shared.load;
const counters = ngx.shared.counters;

// Beside the replicas, where the profile `triton` runs them (triton.js).
const TRITONS = ['triton', 'triton-canary'];

// Of what is counted for holders, by their names: to ask for one costs twice as much as to count in it.
const zones = {
    limits: ngx.shared.limits, end_users: ngx.shared.end_users, slots: ngx.shared.slots, user_slots: ngx.shared.user_slots,
    beyond: ngx.shared.beyond,
};

const REQUEST = 2 ** 32;   // what a request in flight adds to a replica's number: the rest is characters of prompt

const GONE = 1000;         // ms that a count of 0 is kept
const ALL = 1e9;   // keys; a shared dictionary gives 1,024 unless told otherwise
const ZONES = ['fleet', 'models', 'cards', 'counters', 'keys', 'limits', 'end_users', 'slots', 'user_slots', 'bodies', 'usage'];   // those that can be full: nothing is evicted from them

// What a replica that does not take requests at once does, by what it says of its sleep (sleep.js).
const NAPS = { closing: 'finishes what it has, then sleeps', asleep: 'the next request wakes it', waking: 'is waking up' };

const worker = ` ${process.pid}`;   // asking for it costs more than counting

// Reads nginx/fleet/*.conf: one {name, host, on, weight} an upstream block, in the order of the files. `on` is the other host
// that a replica is on, '' for this one: its server is that host's link. The file `left-out` there names upstreams, a line each,
// that are no replicas now (`make up ARGS='--replicas N'`).
function read() {
    const folder = `${ngx.prefix}fleet/`;
    const replicas = [];
    const files = fs.readdirSync(folder);
    const out = files.includes('left-out') ? fs.readFileSync(`${folder}left-out`, 'utf8').split('\n') : [];
    for (const file of files.filter((name) => name.endsWith('.conf')).sort()) {
        replicas.push(...parse(fs.readFileSync(folder + file, 'utf8')).filter(({ name }) => !out.includes(name)));
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
            const [, on] = /^link-([a-z0-9-]+):\d+$/.exec(server[1]) || [];
            replicas.push({ name, host: server[1], on: on || '', weight: weight ? Number(weight[1]) : 1 });
        }
    }
    return replicas;
}

// A JSON value of the shared dictionary.
function get(key, otherwise) {
    const text = shared.get(key);
    return text === undefined ? otherwise : JSON.parse(text);
}

// Sets a JSON value; says whether there was room.
function set(key, value) {
    return put('fleet', key, JSON.stringify(value));
}

// Writes into a zone; says whether there was room. Where there was none the old value goes too, or it would be believed for ever.
function put(zone, key, text) {
    try {
        ngx.shared[zone].set(key, text);
        return true;
    } catch (e) {
        ngx.shared[zone].delete(key);
        lost(zone, e);
        return false;
    }
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
    return get(`look:${name}`, { alive: null, reason: 'not asked yet', metrics: {} });
}

// [state, reason] of a replica, from the last look, the last one-token request, the last failed connection and the
// operator's and the autoscaler's word.
function stateOf(name, look) {
    const down = get(`down:${name}`);
    const probe = get(`probe:${name}`);
    const parked = get('parked', []).includes(name);
    if (parked && !look.alive) {
        return ['stopped', 'stopped by the autoscaler'];
    }
    if (down) {
        return ['unreachable', down.reason];
    }
    if (!look.alive) {
        return [look.alive === null ? 'unknown' : look.state, look.reason];
    }
    const nap = look.sleep && NAPS[look.sleep.state];
    if (nap) {
        return shared.has(`drain:${name}`) ? ['draining', 'drained by the operator, and asleep'] : ['asleep', nap];
    }
    if (!probe) {
        return ['loading', look.complaint || 'has not answered a one-token request yet'];
    }
    if (!probe.ok) {
        return ['wedged', probe.reason];
    }
    if (shared.has(`drain:${name}`)) {
        return ['draining', 'drained by the operator'];
    }
    if (parked) {
        return ['draining', 'drained by the autoscaler'];
    }
    return ['ready', ''];
}

// The table, made from all records:
// {replicas: [{id, name, host, on, weight, state, reason, canary, suspect, sleep, metrics}], canary: its share or null}; `sleep` is
// what the replica says of its sleep, null for who has no sleep mode or is not there.
function build() {
    const ids = get('ids', {});
    const canary = get('canary', { share: null, replicas: [] });
    const now = { replicas: [], canary: null };
    for (const { name, host, on, weight } of read()) {
        const look = record(name);
        const [state, reason] = stateOf(name, look);
        // Given up, maybe too soon: not asked yet, a failed connection, or so slow that it seems dead (`late`) or wedged. Where
        // nothing else is left, as while the others load, it is better to wait there than to be refused.
        const suspect = state === 'unknown' || state === 'wedged'
            || (look.alive || look.late) && (state === 'unreachable' || state === 'loading');
        // A replica keeps its number when others come and go: prefix.js remembers by number. In its sleep it forgets its cache.
        if (state === 'asleep') {
            delete ids[name];
        } else {
            ids[name] = ids[name] || unused(ids);
        }
        now.replicas.push({
            id: ids[name],
            name,
            host,
            on,
            weight,
            state,
            reason,
            canary: canary.replicas.includes(name),
            suspect: suspect && !shared.has(`drain:${name}`) && !get('parked', []).includes(name),
            sleep: (look.alive || look.late) && look.sleep || null,
            metrics: look.metrics,
        });
    }
    set('ids', ids);
    // One of Tritons alone is no matter of the replicas.
    now.canary = now.replicas.some((replica) => replica.canary) ? canary.share : null;
    return now;
}

// A number for a replica, from 1 to 255: the next one that nobody has.
function unused(ids) {
    let next = ids[''] || 0;
    let tries = 255;
    do {
        next = next % 255 + 1;
    } while (--tries && Object.keys(ids).some((name) => name && ids[name] === next));
    ids[''] = next;
    return next;
}

// Makes the table anew, for all workers, and returns it.
function publish() {
    started();
    ZONES.forEach((zone) => counters.add(`lost|${zone}`, 0));
    let now, turn;
    // Two workers could go on for ever; health.js publishes again within a second.
    let rounds = 5;
    do {
        turn = counters.incr('publishing', 1, 0);
        now = build();
        set('table', now);
        // Another worker that has begun meanwhile may know more, and have been the first to write.
    } while (counters.get('publishing') !== turn && --rounds);
    // After the table: who reads this number reads this table or a later one.
    counters.incr('table', 1, 0);
    return now;
}

let seen = 0;
let parsed = null;

// The table; with each replica's `models`; with `models`, the indices of the replicas of each model; with `names`, the first name
// of each model that has several; with `untold`, whether some replica has not told its models yet; and with `lists`, what route.js
// made of it. It is read anew only when another one was published.
function table() {
    const number = counters.get('table');
    if (number === undefined) {
        publish();
        return table();
    }
    if (number !== seen) {
        // There is none if it found no room.
        parsed = get('table') || build();
        const { of, by, names, untold } = listing(parsed.replicas);
        parsed.replicas.forEach((replica, i) => { replica.models = of[i]; });
        parsed.models = by;
        parsed.names = names;
        parsed.untold = untold;
        parsed.lists = Object.create(null);
        seen = number;
    }
    return parsed;
}

let listed = { key: '' };

// The names of models: `of` each of these replicas, `by` name the indices of those that serve it, and of further `names` the
// model's first one. They seldom change, and are read anew only then.
function listing(replicas) {
    const key = `${counters.get('models')} ${replicas.map((replica) => replica.name)}`;
    if (key !== listed.key) {
        listed = { key, of: [], by: Object.create(null), names: Object.create(null), untold: false };
        replicas.forEach(({ name }, index) => {
            const text = models.get(name);
            const groups = JSON.parse(text || '[]');
            listed.untold = listed.untold || !text;
            listed.of.push(groups.flat());
            for (const model of groups.flat()) {
                (listed.by[model] = listed.by[model] || []).push(index);
            }
            for (const [first, ...others] of groups) {
                others.forEach((other) => { listed.names[other] = listed.names[other] || first; });
            }
        });
    }
    return listed;
}

// The names in these cards, those of one model together: it has the same root, and is no adapter.
function grouped(said) {
    const groups = [];
    const of = Object.create(null);
    for (const { id, root, parent } of said) {
        const key = root && !parent ? root : ` ${id}`;
        if (!of[key]) {
            groups.push(of[key] = []);
        }
        of[key].push(id);
    }
    return groups;
}

// Takes over what a replica says its models are: their cards. Says whether there was room for their names.
function learn(name, said) {
    for (const card of said) {
        put('cards', card.id, JSON.stringify(card));
    }
    const names = JSON.stringify(grouped(said));
    if (models.get(name) === names) {
        return true;
    }
    const kept = put('models', name, names);
    counters.incr('models', 1, 0);
    const { by } = listing(read());
    cards.keys(ALL).forEach((model) => by[model] || cards.delete(model));
    return kept;
}

// The card of a model, with what clients of OpenAI's and of Anthropic's API read in one.
function card(model) {
    const said = JSON.parse(cards.get(model) || JSON.stringify({ id: model, object: 'model' }));
    const base = said.parent && JSON.parse(cards.get(said.parent) || '{}');
    // An adapter takes what its model takes.
    const length = said.max_model_len || base && base.max_model_len || null;
    return Object.assign({ type: 'model', display_name: model, lifecycle: 'active' }, said, {
        created_at: new Date((said.created || 0) * 1000).toISOString(), max_model_len: length, max_input_tokens: length,
    });
}

const contexts = Object.create(null);   // by model

// The tokens that a model takes at most, or null. Who has it from another is looked up each time.
function context(model) {
    const text = cards.get(model);
    const known = contexts[model];
    if (known && known.text === text) {
        return known.length;
    }
    const { parent, max_model_len: length } = card(model);
    if (text !== undefined && !parent) {
        contexts[model] = { text, length };
    }
    return length;
}

// The indices of the replicas that serve this model, or undefined.
function serving(now, model) {
    return now.models[model];
}

// The time in milliseconds, for what is compared with a time noted earlier. It counts from the machine's start, so that a
// step of the wall clock does not keep a replica from being watched for hours.
function clock() {
    return Math.round(parseFloat(fs.readFileSync('/proc/uptime', 'utf8')) * 1000);
}

// When this gateway began, by `clock`; a reload does not count.
function started() {
    counters.add('started', clock());
    return counters.get('started');
}

// A connection to the replica failed: it leaves the route at once; health.js brings it back.
function unreachable(name) {
    if (!set(`down:${name}`, { reason: 'a connection failed', at: clock() })) {
        shared.delete(`probe:${name}`);
    }
    publish();
}

// Adds to a count of all workers, which is given, and to this worker's part of it.
function count(name, more) {
    load.incr(name + worker, more, 0);
    return load.incr(name, more, 0);
}

// A request goes to the replica, which has to compute so many characters of its prompt.
function enter(name, work) {
    count(name, REQUEST + work);
}

// Its answer has begun.
function begun(name, work) {
    count(name, -work);
}

// It is over; `work` is what of its prompt was not computed.
function leave(name, work) {
    count(name, -REQUEST - work);
}

// A replica answered a request: counts its answers of 5xx in a row. Those of 4xx are the client's matter.
function answered(name, status) {
    const key = 'failures:' + name;
    if (status >= 500) {
        load.incr(key, 1, 0);
    } else if (status < 400 && load.has(key)) {
        load.delete(key);
    }
}

function failures(name) {
    return load.get(`failures:${name}`) || 0;
}

// Its requests in flight times REQUEST, plus the characters of prompt that they wait for: those that the replica was sent and
// has not computed, and had not in its cache.
function number(name) {
    return load.get(name) || 0;
}

// The Tritons that had a request: {name}.
function tritons() {
    return TRITONS.filter((name) => load.has(name)).map((name) => ({ name }));
}

function inFlight(name) {
    return Math.floor(number(name) / REQUEST);
}

// Deletes a count of 0, and what another worker has added meanwhile stays.
function forget(zone, name) {
    const left = zone.pop(name);
    if (left) {
        zone.incr(name, left, 0);
    }
}

// A worker that was killed never counted its requests out.
function forgetDeadWorkers() {
    for (const zone of ['load', 'slots', 'user_slots', 'beyond', 'bodies']) {
        const dictionary = ngx.shared[zone];
        for (const key of dictionary.keys(ALL)) {
            const [name, pid] = key.split(' ');
            if (pid && !fs.existsSync(`/proc/${pid}`)) {
                const amount = dictionary.pop(key) || 0;
                if (zone === 'load') {
                    load.incr(name, -amount, 0);
                } else if (zone === 'bodies') {
                    if (!dictionary.incr(name, -amount, 0)) {
                        forget(dictionary, name);
                    }
                } else {
                    drop(zone, name, amount);
                }
            }
        }
    }
}

// Takes from a count of these zones. One that comes to 0 goes soon, so that it takes no room; not at once, as another may be
// adding to it.
function drop(zone, key, amount) {
    const dictionary = zones[zone];
    try {
        if (dictionary.incr(key, -amount, 0) <= 0 && dictionary.incr(key, 0, 0, GONE) > 0) {
            dictionary.incr(key, 0, 0);
        }
    } catch (e) {
        lost(zone, e);
    }
}

export default {
    ALL, ZONES, TRITONS, REQUEST, zones, read, parse, get, set, put, lost, record, publish, table, serving, learn, card, context, clock, started,
    unreachable, count, worker, forget, enter, begun, leave, answered, failures, number, tritons, inFlight, forgetDeadWorkers, drop,
};
