// How busy each replica is, and which of some has least to do. A replica of twice the weight carries twice as much.

import fleet from './fleet.js';

const counters = ngx.shared.counters;

// How many requests a replica may have beyond the one with fewest, or how many times the mean, whichever is more …
const NEW = [1, 1.5];        // … and still be given a prompt that nobody has
const SOFT = [4, 1.25];      // … before a beginning that much of its work shares is given to another replica too
const HARD = [8, 2];         // … before all that comes goes elsewhere, here of the mean of the others: affinity overloads nobody

const ALIKE = 1.25;          // times the least work: no reason to prefer one replica to the other

// How much each replica has in flight, the least and the mean.
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

// What a replica may have in flight within this bound.
function limit(load, bound) {
    return Math.max(load.least + bound[0], load.mean * bound[1]);
}

// Whether the i-th replica has too much to do to be sent even what it knows. It is held against the others: of a mean with
// itself, two replicas never have twice as much.
function overloaded(load, i) {
    const count = load.busy.length;
    const others = (load.mean * count - load.busy[i]) / (count - 1);
    return count > 1 && load.busy[i] > Math.max(load.least + HARD[0], others * HARD[1]);
}

function workOf(replica) {
    return fleet.work(replica.name) / replica.weight;
}

// The next one in turn.
function next(list) {
    return list[counters.incr('turn', 1, 0) % list.length];
}

// The one with the fewest requests in flight; of several such, the next in turn.
function leastBusy(list) {
    let best = list[0];
    let least = Infinity;
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
    while (works[i] > Math.max(least, least * ALIKE)) {
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

export default { SOFT, loads, limit, overloaded, next, leastBusy, lightest, better };
