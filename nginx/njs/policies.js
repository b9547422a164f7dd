// The policies: how a replica is chosen among those that may take a request.
//
// A policy is a function of `list`, the ready replicas that serve the model (one at least), `asked`, what body.js read, and
// `share`, the canary's part of new conversations or null. It gives the replica, the reason that log and metrics show, and the
// characters of prompt that the replica has to compute.

import load from './load.js';
import metrics from './metrics.js';
import prompts from './prefix.js';

const counters = ngx.shared.counters;

// What a replica would compute that another one knows of this very conversation counts twice: it takes time, and it takes room
// in one more cache. A beginning that others share is worth its room there.
const AGAIN = 2;
const SHARED = 3;            // requests in flight with who knows a shared beginning, from where on an idle replica learns it too
const ALIKE = 3000;          // characters of prompt: no reason to prefer the replica that has less to do
const MOST_WORK = 1e6;       // characters that one request counts for

// Where the session was, or where the prompt is computed soonest: waiting for what a replica has to do is weighed against
// computing what it does not know.
function prefix(list, asked, share) {
    const prompt = prompts.cutsOf(asked.body, asked.model);
    if (asked.session) {
        return bySession(list, asked, share, prompt);
    }
    if (!prompt) {
        return least_busy(list, asked, share);
    }
    let replica = share === null ? null : soonest(list, load.loads(list), prompt, true);
    if (!replica) {
        list = group(list, share);
        replica = soonest(list, load.loads(list), prompt, false);
    }
    const reason = prompt.at < 0 ? 'load' : 'prefix';
    return [replica, reason, remember(prompt, replica)];
}

// Where least is in flight.
function least_busy(list, asked, share) {
    return [load.leastBusy(group(list, share)), 'load', 0];
}

// Each as often as the others. It knows no canary.
function round_robin(list) {
    return [load.next(list), 'turn', 0];
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

// The packed ids of the replicas that were sent the prompt up to its i-th cut.
function holders(prompt, i) {
    return prompt.holders[i] = prompts.holders(prompts.key(prompt, i));
}

// The replica that will have computed this prompt soonest. `own`: only one that knows its conversation, or null.
function soonest(list, loads, prompt, own) {
    const { todo, least, busy } = loads;
    const cuts = prompt.cuts;
    const end = cuts.length - 1;
    let cost = Infinity;
    let chosen = -1;
    let times = 1;
    for (let at = end; at >= 0 && !(own && !(cuts[at] & prompts.OWN)); at--) {
        const again = times * (cuts[end] - cuts[at]) / 4;
        // Who knows only less than this is no better, however idle.
        if (least + again >= cost) {
            break;
        }
        const packed = holders(prompt, at);
        if (packed && cuts[at] & prompts.OWN) {
            times = AGAIN;
        }
        for (let i = 0; packed && i < list.length; i++) {
            if (todo[i] + again < cost && prompts.holds(packed, list[i].id)) {
                cost = todo[i] + again;
                chosen = i;
                prompt.at = at;
            }
        }
    }
    if (!own && least + times * cuts[end] / 4 < cost) {
        chosen = todo.indexOf(least);
        prompt.at = -1;
    } else if (!own && times === 1 && least === 0 && busy[chosen] >= SHARED) {
        const idle = list[todo.indexOf(0)];
        while (prompt.at >= 0 && !prompts.holds(holders(prompt, prompt.at), idle.id)) {
            prompt.at--;
        }
        return idle;
    }
    return chosen < 0 ? null : inTurn(list, todo, chosen, prompt.at < 0 ? 0 : prompt.holders[prompt.at]);
}

// Of those that have about as little to do as the i-th, and were sent as much, the next in turn. Requests that end together are
// followed by requests that begin together: in turn they meet fewer others that begin.
function inTurn(list, todo, i, packed) {
    const found = [];
    let weights = 0;
    for (let one = 0; one < list.length; one++) {
        if (todo[one] <= todo[i] + ALIKE && (!packed || prompts.holds(packed, list[one].id))) {
            found.push(list[one]);
            weights += list[one].weight;
        }
    }
    let at = 0;
    if (found.length > 1) {
        for (let turn = counters.incr('new', 1, 0) % weights; turn >= found[at].weight; at++) {
            turn -= found[at].weight;
        }
    }
    return found[at];
}

// The replica is sent this prompt now. What comes before the match it was sent already. Gives the characters that it does not
// know.
function remember(prompt, replica) {
    const end = prompt.cuts.length - 1;
    const at = prompt.at;
    for (let i = Math.max(0, at); i <= end; i++) {
        // The end is set each time, so that what is in use stays.
        if (prompt.cuts[i] & prompts.KEPT && (i !== at || i === end)) {
            const packed = prompt.holders[i] === undefined ? holders(prompt, i) : prompt.holders[i];
            prompts.keep(prompts.key(prompt, i), replica.id, packed);
        }
    }
    metrics.blocks(at + 1, end - at);
    return Math.min(MOST_WORK, Math.floor((prompt.cuts[end] - (at < 0 ? 0 : prompt.cuts[at])) / 4) + prompt.more);
}

// A session stays where it was last, unless that one is too busy: one key may name all that an application asks. A new one
// begins where its prompt fits best.
function bySession(list, asked, share, prompt) {
    const key = prompts.hash(`session ${asked.model} ${asked.session}`);
    const packed = prompts.holders(key);
    const loads = load.loads(list);
    let replica = null;
    for (let rest = packed; rest && !replica; rest = Math.floor(rest / 256)) {
        const i = list.findIndex((one) => rest % 256 === one.id);
        if (i >= 0 && loads.todo[i] < Infinity) {
            replica = list[i];
        }
    }
    const reason = replica ? 'session' : 'load';
    if (replica && prompt) {
        prompt.at = prompt.cuts.length - 1;
        while (prompt.at >= 0 && !prompts.holds(holders(prompt, prompt.at), replica.id)) {
            prompt.at--;
        }
    } else if (!replica) {
        list = group(list, share);
        replica = prompt ? soonest(list, load.loads(list), prompt, false) : load.leastBusy(list);
    }
    prompts.keep(key, replica.id, packed);
    return [replica, reason, prompt ? remember(prompt, replica) : 0];
}

// By the names that ROUTE_POLICY gives them; the first is the default.
export default { prefix, least_busy, round_robin, session };
