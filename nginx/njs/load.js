// How busy each replica is, and which of some has least to do. A replica of twice the weight carries twice as much.
//
// What a replica has to do before it begins with a new prompt is told in characters of prompt: those that it was sent and has
// not computed, and something for each request in flight, as making tokens takes its time too.

import fleet from './fleet.js';

const counters = ngx.shared.counters;

const REQUEST = fleet.REQUEST;
const ANSWER = 1000;         // characters of prompt that take a replica about as long as its part in one answer
// How many requests a replica may have beyond the one with fewest, or how many times the mean of the others, whichever is
// more, before all that comes goes elsewhere: affinity overloads nobody.
const MOST = [8, 2];

// What each replica has to do before a new prompt, Infinity for who has too much; the least of it; and the requests in flight of
// each, by weight.
function loads(list) {
    const count = list.length;
    const busy = [];
    const todo = [];
    let fewest = Infinity;
    let least = Infinity;
    let sum = 0;
    for (let i = 0; i < count; i++) {
        const { name, weight } = list[i];
        const number = fleet.number(name);
        const requests = Math.floor(number / REQUEST);
        const one = requests / weight;
        const work = (ANSWER * requests + number - REQUEST * requests) / weight;
        busy.push(one);
        todo.push(work);
        sum += one;
        fewest = one < fewest ? one : fewest;
        least = work < least ? work : least;
    }
    // Held against the others: of a mean with itself, one of two never has twice as much.
    const most = fewest + MOST[0];
    if (sum > most && count > 1) {
        least = Infinity;
        for (let i = 0; i < count; i++) {
            if (busy[i] > most && busy[i] > MOST[1] * (sum - busy[i]) / (count - 1)) {
                todo[i] = Infinity;
            } else if (todo[i] < least) {
                least = todo[i];
            }
        }
    }
    return { todo, least, busy };
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

export default { loads, next, leastBusy };
