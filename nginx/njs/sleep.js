// When models sleep and wake, where their replicas can (vllm/sleeper.py): those that nobody asks for give up the GPUs' memory.
//
// The replicas of a model sleep and wake together. Of replicas that share GPUs one is awake at a time: who is wanted longest comes
// first, and who is awake gives way when it has had its turn, or a pause. A replica finishes what it has before it sleeps, and
// what comes meanwhile waits there, so nothing is lost whatever is decided here. What is decided depends on nothing but what the
// replicas say, so several gateways decide alike.

import fleet from './fleet.js';
import settings from './settings.js';
import timetable from './timetable.js';

const TURN_S = 20;     // that a replica stays awake, although another is wanted
const PAUSE_S = 5;     // without a request, after which it gives way sooner
const ASK_MS = 400;    // for all replicas' answers, and again for what they are told: both are over before the next turn begins

const sleeps = (replica) => replica.sleep.state === 'asleep';
const awake = (replica) => replica.sleep.state === 'awake';

// Who is to sleep now and who to wake: {sleep, wake}, each the names of replicas. `replicas`: those that can sleep, each with its
// `name`, `models`, `drained` and `sleep`, what it says of itself. `after`: seconds without a request. `due`: whether a model is to
// be awake by the timetable.
function decide(replicas, after, due) {
    const of = Object.create(null);
    for (const replica of replicas) {
        const key = replica.models[0] || replica.name;
        const model = of[key] = of[key] || { wanted: null, idle: Infinity, awake: false, due: replica.models.some(due) };
        const { wanted, idle } = replica.sleep;
        replica.of = model;
        model.wanted = wanted === null ? model.wanted : Math.max(wanted, model.wanted);
        if (awake(replica)) {
            model.awake = true;
            model.idle = Math.min(idle, model.idle);
        }
    }
    const rests = (model) => !model.due && model.idle >= after;
    const sleep = new Set(replicas.filter((replica) => awake(replica) && rests(replica.of)).map(({ name }) => name));
    const wake = [];
    const claimed = new Set();
    const wanting = replicas.filter((replica) => sleeps(replica) && !replica.drained
        && (replica.of.wanted !== null || replica.of.due || replica.of.awake && !rests(replica.of)));
    const rank = ({ of: { wanted } }) => wanted === null ? -1 : wanted;
    wanting.sort((one, other) => rank(other) - rank(one) || (one.name < other.name ? -1 : 1));
    for (const replica of wanting) {
        const { gpus, wanted } = replica.sleep;
        const others = replicas.filter((other) => !sleeps(other) && other.sleep.gpus.some((gpu) => gpus.includes(gpu)));
        // One that is awake already need not take another's turn, unless requests wait at this one.
        if (gpus.some((gpu) => claimed.has(gpu)) || others.length && replica.of.awake && wanted === null) {
            continue;
        }
        if (!others.length) {
            wake.push(replica.name);
        }
        others.filter((other) => awake(other) && givesWay(other, replica)).forEach(({ name }) => sleep.add(name));
        gpus.forEach((gpu) => claimed.add(gpu));
    }
    return { sleep: [...sleep], wake };
}

// Whether a replica that is awake gives way to one that is wanted, or due by the timetable.
function givesWay(replica, to) {
    const { seconds, idle } = replica.sleep;
    return to.of.wanted !== null ? seconds >= TURN_S || idle >= PAUSE_S : !replica.of.due && idle >= TURN_S;
}

// What a replica says of its sleep, on a header or in an answer; null where it has no sleep mode.
function told(text) {
    try {
        const said = JSON.parse(text);
        return ['awake', 'closing', 'asleep', 'waking'].includes(said.state) && Array.isArray(said.gpus) ? said : null;
    } catch (e) {
        return null;
    }
}

// ---- once a second

// One request to a replica; null where no answer came in time.
async function ask(host, path, method) {
    let timer = null;
    const late = new Promise((resolve) => {
        timer = setTimeout(() => {
            timer = null;
            resolve(null);
        }, ASK_MS);
    });
    const asked = ngx.fetch(`http://${host}${path}`, { method, headers: { 'X-Gateway-Probe': '1' } })
        .then(async (answer) => answer.status === 200 ? told(await answer.text()) : null).catch(() => null);
    const said = await Promise.race([asked, late]);
    if (timer !== null) {
        clearTimeout(timer);
    }
    return said;
}

async function turn() {
    const known = fleet.table().replicas.filter(({ sleep }) => sleep);
    if (!known.length) {
        return;
    }
    const hosts = {};
    fleet.read().forEach(({ name, host }) => { hosts[name] = host; });
    // What they say now, not a second ago: of two that share a GPU another gateway may have woken one.
    const said = await Promise.all(known.map(({ name }) => ask(hosts[name], '/is_sleeping', 'GET')));
    const minute = timetable.minuteOf(Date.now());
    const { sleep, wake } = decide(known.map(({ name, models, state, sleep: last }, i) => ({
        // Who says nothing may hold its memory.
        name, models, drained: state === 'draining', sleep: said[i] || Object.assign({}, last, { state: 'unknown', wanted: null }),
    })), settings.sleepAfter, (model) => timetable.has(settings.awake, model, minute));
    for (const name of sleep) {
        // Before it is told: from now on requests go to the others, or wait there.
        const look = fleet.record(name);
        fleet.set(`look:${name}`, Object.assign(look, { sleep: Object.assign({}, look.sleep, { state: 'closing' }) }));
    }
    if (sleep.length) {
        fleet.publish();
    }
    await Promise.all([
        ...sleep.map((name) => ask(hosts[name], '/sleep', 'POST')), ...wake.map((name) => ask(hosts[name], '/wake_up', 'POST')),
    ]);
}

export default { decide, told, turn };
