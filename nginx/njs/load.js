// How busy each replica is, and which of some has least to do. A replica of twice the weight carries twice as much.
//
// What a replica has to do before it begins with a new prompt is told in characters of prompt: those that it was sent and has
// not computed, and something for each request in flight, as making tokens takes its time too.

import fleet from './fleet.js';

const counters = ngx.shared.counters;

const ANSWER = 1000;         // characters of prompt that take a replica about as long as its part in one answer
const ALIKE = 3000;          // characters: no reason to prefer one replica to the other
// How many requests a replica may have beyond the one with fewest, or how many times the mean of the others, whichever is
// more, before all that comes goes elsewhere: affinity overloads nobody.
const MOST = [8, 2];

// What each replica has to do before a new prompt, the least of it, and Infinity for who has too much.
function loads(list) {
    const count = list.length;
    const busy = [];
    const todo = [];
    let fewest = Infinity;
    let sum = 0;
    for (let i = 0; i < count; i++) {
        const { name, weight } = list[i];
        const number = fleet.number(name);
        const one = busy[i] = Math.floor(number / fleet.REQUEST) / weight;
        todo[i] = ANSWER * one + number % fleet.REQUEST / weight;
        sum += one;
        if (one < fewest) {
            fewest = one;
        }
    }
    let least = Infinity;
    for (let i = 0; i < count; i++) {
        // Held against the others: of a mean with itself, one of two never has twice as much.
        if (count > 1 && busy[i] > Math.max(fewest + MOST[0], MOST[1] * (sum - busy[i]) / (count - 1))) {
            todo[i] = Infinity;
        } else if (todo[i] < least) {
            least = todo[i];
        }
    }
    return { todo, least };
}

// Of those with this index that have about as little to do as the i-th, the next in turn. Requests that end together are
// followed by requests that begin together: in turn they meet fewer others that begin.
function inTurn(list, loads, alike, i) {
    const most = loads.todo[i] + ALIKE;
    const found = alike.filter((one) => loads.todo[one] <= most);
    if (found.length === 1) {
        return list[found[0]];
    }
    let turn = counters.incr('new', 1, 0) % found.reduce((sum, one) => sum + list[one].weight, 0);
    let at = 0;
    while ((turn -= list[found[at]].weight) >= 0) {
        at++;
    }
    return list[found[at]];
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

export default { loads, inTurn, next, leastBusy };
