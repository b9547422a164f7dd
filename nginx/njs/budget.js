// The bytes of requests' bodies that lie here, and of answers that wait for their clients: each has a limit of its own, this is
// the limit of their sum. The holder of a key has a quarter of it at most, or one body, so that it can't keep the others out; where
// no keys are asked for, an address has a half.
//
// A body takes its room before it is read, or is refused. Up to 1 MiB it lies in memory until the request is over, else on disk
// until the answer begins: then nobody needs it again, and Nginx closes its file, which has no name from the start. Small ones are
// not counted: all that there are connections for take 128 MiB together.

import fleet from './fleet.js';
import settings from './settings.js';

const shares = ngx.shared.bodies;

const SHARE = 4;             // holders that fill a place …
const ADDRESSES = 2;         // … or addresses, behind each of which may be many
const SMALL = 1 << 14;       // bytes: up to here a body is not counted; the two workers have connections for 8,000 requests
const BUFFER = 1 << 20;      // bytes: client_body_buffer_size, up to which a body stays in memory
const FILED = 1 << 17;       // bytes: from here on a file does as well, where memory has no room
const MEMORY = 256 << 20;    // bytes in memory, of the gateway's 1 GiB
const LARGEST = 64 << 20;    // bytes: client_max_body_size, and what a body without a length is taken for until it is there

// Takes room for a body that is yet to be read, for the holder of this name, '' where no keys are asked for; `said` is its header
// Content-Length. Gives where it will lie; 'share' where the other bodies of that holder or address are in its way, 'full' where
// those of others are.
function take(r, name, said) {
    const length = said !== undefined ? Number(said)
        : r.headersIn['Transfer-Encoding'] === undefined && r.httpVersion < '2' ? 0 : LARGEST;
    if (length <= SMALL) {
        return 'memory';
    }
    const who = name || '@' + r.variables.remote_addr;
    let found = length <= BUFFER ? hold(r, 'memory', length, MEMORY, who) : '';
    if (found !== 'memory' && length > FILED) {
        found = hold(r, 'disk', length, settings.bodies, who);
    }
    return found;
}

function hold(r, place, bytes, most, who) {
    const mine = change(place, bytes, who);
    if (mine > most / (who[0] === '@' ? ADDRESSES : SHARE) && mine > bytes) {
        change(place, -bytes, who);
        return 'share';
    }
    const key = 'body:' + place;
    if (fleet.count(key, bytes) > most) {
        fleet.count(key, -bytes);
        change(place, -bytes, who);
        return 'full';
    }
    r.variables.body = place + ' ' + bytes + ' ' + who;
    return place;
}

// Adds to the bytes that a holder has in a place, and gives them. Who has none has no counter.
function change(place, bytes, who) {
    if (!who || !bytes) {
        return 0;
    }
    const key = place + ':' + who;
    const own = key + fleet.worker;
    let sum;
    try {
        if (!shares.incr(own, bytes, 0)) {
            shares.delete(own);
        }
        sum = shares.incr(key, bytes, 0);
    } catch (e) {
        // No room for another counter: only the sum of all counts.
        fleet.lost('bodies', e);
        return 0;
    }
    if (!sum) {
        fleet.forget(shares, key);
    }
    return sum;
}

// Takes room in memory for so many bytes of an answer that its client has not read yet; says whether there was any.
function more(r, bytes) {
    const variables = r.variables;
    const [, before, who] = (variables.body || `memory 0 ${variables.key || ''}`).split(' ');
    if (hold(r, 'memory', bytes, MEMORY, who) !== 'memory') {
        return false;
    }
    variables.body = `memory ${Number(before) + bytes} ${who}`;
    return true;
}

// The body is there, and so long.
function settle(r, length) {
    const [place, bytes, who] = (r.variables.body || '').split(' ');
    if (bytes && Number(bytes) !== length) {
        fleet.count(`body:${place}`, length - bytes);
        change(place, length - bytes, who);
        r.variables.body = `${place} ${length} ${who}`;
    }
}

// The answer begins.
function begun(r) {
    const variables = r.variables;
    const held = variables.body;
    if (held && held[0] === 'd') {
        free(held);
        variables.body = '';
    }
}

// The request of these variables is over.
function over(variables) {
    const held = variables.body;
    if (held) {
        free(held);
    }
}

function free(held) {
    const [place, bytes, who] = held.split(' ');
    fleet.count('body:' + place, -bytes);
    change(place, -bytes, who);
}

export default { take, more, settle, begun, over };
