// The policies: how a replica is chosen among those that may take a request.
//
// A policy is a function of `list`, the ready replicas that serve the model (one at least), `asked`, what body.js read and
// whether there are `several` gateways, and `share`, the canary's part of new conversations or null. It gives the replica, the
// reason that log and metrics show, and the characters of prompt that the replica has to compute.

import load from './load.js';
import metrics from './metrics.js';
import prompts from './prefix.js';

const counters = ngx.shared.counters;

// What a replica would compute that another one knows counts three times: it takes time, it takes room in one more cache, and
// two replicas that know the same share what comes of it from then on.
const AGAIN = 3;
const SHARED = 3;            // requests in flight with who knows a shared beginning, from where on an idle replica learns it too
const ALIKE = 3000;          // characters of prompt: no reason to prefer the replica that has less to do
const NEAR = 12000;          // characters of prompt that a replica may have more to do and still be a prompt's home
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
    if (asked.several) {
        prompt.several = true;
    }
    let replica = share === null ? null : soonest(list, load.loads(list), prompt, true);
    if (!replica) {
        list = share === null ? list : group(list, share);
        replica = soonest(list, load.loads(list), prompt, false);
    }
    const reason = prompt.at < 0 ? 'load' : 'prefix';
    return [replica, reason, remember(asked, prompt, replica)];
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

// The replica that will have computed this prompt soonest. `own`: only one that knows its conversation, or null.
function soonest(list, loads, prompt, own) {
    const { todo, least, busy } = loads;
    const cuts = prompt.cuts;
    const end = cuts.length - 1;
    let cost = Infinity;
    let chosen = -1;
    let known = -1;   // the last cut that anybody knows: what follows it is computed wherever it goes
    for (let at = end; at >= 0 && !(own && !(cuts[at] & prompts.OWN)); at--) {
        const again = known < 0 ? 0 : AGAIN * (cuts[known] - cuts[at]) / 4;
        // Who knows only less than this is no better, however idle.
        if (least + again >= cost) {
            break;
        }
        const packed = prompts.holdersAt(prompt, at);
        if (packed && known < 0) {
            known = at;
        }
        for (let i = 0; packed && i < list.length; i++) {
            if (todo[i] + again < cost && prompts.holds(packed, list[i].id)) {
                cost = todo[i] + again;
                chosen = i;
                prompt.at = at;
            }
        }
    }
    if (!own && least + (known < 0 ? 0 : AGAIN * cuts[known] / 4) < cost) {
        chosen = todo.indexOf(least);
        prompt.at = -1;
    } else if (!own && least === 0 && busy[chosen] >= SHARED && !(cuts[known] & prompts.OWN) && !prompt.several) {
        // With several gateways, who is idle here may be busy for another.
        const idle = list[todo.indexOf(0)];
        while (prompt.at >= 0 && !prompts.holds(prompts.holdersAt(prompt, prompt.at), idle.id)) {
            prompt.at--;
        }
        return idle;
    }
    if (chosen < 0) {
        return null;
    }
    const packed = prompt.at < 0 ? 0 : prompt.holders[prompt.at];
    return prompt.several ? atHome(list, todo, chosen, packed, prompt) : inTurn(list, todo, chosen, packed);
}

// Of those that have about as little to do as the i-th, and were sent as much, the one that a hash of the prompt's beginning and
// the replica's name says, by weight (rendezvous hashing): another gateway, which knows nothing of this one, says the same.
// `prompt.away`: the one that the hash says of all has too much to do. What others share is not remembered there, or each gateway
// would keep it in another replica's cache from then on.
function atHome(list, todo, i, packed, prompt) {
    const beginning = prompts.beginning(prompt);
    let home = list[i];
    let first = home;
    let least = Infinity;
    let leastOfAll = Infinity;
    for (let one = 0; one < list.length; one++) {
        const replica = list[one];
        if (!packed || prompts.holds(packed, replica.id)) {
            const draw = -Math.log(prompts.draw(beginning, replica)) / replica.weight;
            if (draw < leastOfAll) {
                leastOfAll = draw;
                first = replica;
            }
            if (todo[one] <= todo[i] + NEAR && draw < least) {
                least = draw;
                home = replica;
            }
        }
    }
    prompt.away = !packed && home !== first;
    return home;
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
function remember(asked, prompt, replica) {
    const cuts = prompt.cuts;
    const end = cuts.length - 1;
    const at = prompt.at;
    // The end is set each time, so that what is in use stays.
    for (let i = at < end ? at + 1 : end; i <= end; i++) {
        if (cuts[i] & prompts.KEPT && (!prompt.away || cuts[i] & prompts.OWN)) {
            prompts.keepAt(prompt, i, replica.id);
        }
    }
    metrics.blocks(at + 1, end - at);
    asked.expected = expected(prompt);
    return Math.min(MOST_WORK, Math.floor((cuts[end] - (at < 0 ? 0 : cuts[at])) / 4) + (prompt.more || 0));
}

// The share of a prompt that the replica's cache should have. That is what it was sent before; and of a conversation that has an
// answer already, what came before the first one, as that was a prompt too: unknown it is where the client has changed it since.
function expected({ cuts, at, more }) {
    const end = cuts.length - 1;
    let known = at;
    for (let i = Math.max(0, at); i < end; i++) {
        if (cuts[i] & prompts.OWN) {
            known = Math.max(i, at);
            break;
        }
    }
    return known < 0 ? 0 : Math.floor(cuts[known] / 4) / (Math.floor(cuts[end] / 4) + (more || 0) || 1);
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
    if (prompt) {
        prompt.several = asked.several;
    }
    if (replica && prompt) {
        prompt.at = prompt.cuts.length - 1;
        while (prompt.at >= 0 && !prompts.holds(prompts.holdersAt(prompt, prompt.at), replica.id)) {
            prompt.at--;
        }
    } else if (!replica) {
        list = group(list, share);
        replica = prompt ? soonest(list, load.loads(list), prompt, false) : load.leastBusy(list);
    }
    prompts.keep(key, replica.id, packed);
    return [replica, reason, prompt ? remember(asked, prompt, replica) : 0];
}

// By the names that ROUTE_POLICY gives them; the first is the default.
export default { prefix, least_busy, round_robin, session };
