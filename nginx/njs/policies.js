// The policies: how a replica is chosen among those that may take a request.
//
// A policy is a function of `list`, the ready replicas that serve the model (one at least), `asked`, what body.js read, and
// `share`, the canary's part of new conversations or null. It gives the replica, and the reason that log and metrics show.

import fleet from './fleet.js';
import load from './load.js';
import metrics from './metrics.js';
import prompts from './prefix.js';

const popular = ngx.shared.popular;

const HOT = 3 / 4;           // of what a busy replica gets, begins alike: worth the room in another cache
const HOT_OF = 4;            // requests, at least, to judge by
const ANSWER = 1000;         // characters of prompt that take a replica about as long as its part in one answer

// Where the session was or the prompt's beginning is cached, unless that one is too busy.
function prefix(list, asked, share) {
    const prompt = prompts.cutsOf(asked.body, asked.model);
    if (asked.session) {
        return bySession(list, asked, share, prompt);
    }
    if (!prompt) {
        return least_busy(list, asked, share);
    }
    let loads = load.loads(list);
    let replica = byPrefix(list, loads, prompt, share !== null);
    if (!replica && share !== null) {
        list = group(list, share);
        loads = load.loads(list);
        replica = byPrefix(list, loads, prompt, false);
    }
    const reason = replica ? 'prefix' : 'load';
    replica = replica || load.lightest(list, loads);
    remember(prompt, replica);
    return [replica, reason];
}

// Where least is in flight.
function least_busy(list, asked, share) {
    return [load.leastBusy(group(list, share)), 'load'];
}

// Each as often as the others. It knows no canary.
function round_robin(list) {
    return [load.next(list), 'turn'];
}

// Where the session was; a request without one where least is in flight.
function session(list, asked, share) {
    return asked.session ? bySession(list, asked, share, null) : least_busy(list, asked, share);
}

// ---- what they are made of

// The canary's share of new conversations: which group of replicas takes one that begins now.
function group(list, share) {
    if (share === null) {
        return list;
    }
    const canary = list.filter((replica) => replica.canary);
    const others = list.filter((replica) => !replica.canary);
    if (!canary.length || !others.length) {
        return list;
    }
    return Math.random() < share ? canary : others;
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
function byPrefix(list, loads, prompt, own) {
    for (let at = prompt.cuts.length - 1; at >= 0; at--) {
        if (own && !(prompt.cuts[at] & prompts.OWN)) {
            continue;
        }
        const key = prompts.key(prompt, at);
        const packed = prompt.holders[at] = prompts.holders(key);
        let chosen = -1;
        for (let i = 0; packed && i < list.length; i++) {
            if (prompts.holds(packed, list[i].id) && (chosen < 0 || load.better(list, loads, i, chosen))) {
                chosen = i;
            }
        }
        if (chosen >= 0 && !load.overloaded(loads, chosen)) {
            if (!own && loads.busy[chosen] > load.limit(loads, load.SOFT) && hot(list[chosen].name, key)) {
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
        if (prompt.cuts[i] & prompts.KEPT && (i !== at || i === end)) {
            const key = prompts.key(prompt, i);
            prompts.keep(key, replica.id, prompt.holders[i] === undefined ? prompts.holders(key) : prompt.holders[i]);
        }
    }
    metrics.blocks(at + 1, end - at);
    const unknown = (prompt.cuts[end] - (at < 0 ? 0 : prompt.cuts[at])) / 4;
    fleet.addWork(replica.name, unknown + prompt.more + ANSWER);
}

// A session stays where it was last, unless that one is too busy: one key may name all that an application asks. A new one
// begins where its prompt fits best.
function bySession(list, asked, share, prompt) {
    const key = prompts.hash(`session ${asked.model} ${asked.session}`);
    const packed = prompts.holders(key);
    let loads = load.loads(list);
    let replica = null;
    for (let rest = packed; rest && !replica; rest = Math.floor(rest / 256)) {
        const i = list.findIndex((one) => rest % 256 === one.id);
        if (i >= 0 && !load.overloaded(loads, i)) {
            replica = list[i];
        }
    }
    const reason = replica ? 'session' : 'load';
    if (!replica) {
        list = group(list, share);
        loads = load.loads(list);
        replica = prompt && byPrefix(list, loads, prompt, false) || load.lightest(list, loads);
    }
    prompts.keep(key, replica.id, packed);
    if (prompt) {
        remember(prompt, replica);
    }
    return [replica, reason];
}

// By the names that ROUTE_POLICY gives them; the first is the default.
export default { prefix, least_busy, round_robin, session };
