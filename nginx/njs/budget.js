// The bytes of requests' bodies that lie here: each has a limit of its own, this is the limit of their sum.
//
// A body takes its room before it is read, or is refused. Up to 1 MiB it lies in memory until the request is over, else on disk
// until the answer begins: then nobody needs it again, and Nginx closes its file, which has no name from the start.

import fleet from './fleet.js';
import settings from './settings.js';

const BUFFER = 1 << 20;      // bytes: client_body_buffer_size, up to which a body stays in memory
const FILED = 1 << 17;       // bytes: from here on a file does as well, where memory has no room
const MEMORY = 256 << 20;    // bytes in memory, of the gateway's 1 GiB
const LARGEST = 64 << 20;    // bytes: client_max_body_size, and what a body without a length is taken for until it is there

// Takes room for a body that is yet to be read. Gives where it will lie, '' where there is no room.
function take(r) {
    const said = r.headersIn['Content-Length'];
    const length = said !== undefined ? Number(said)
        : r.headersIn['Transfer-Encoding'] === undefined && r.httpVersion < '2' ? 0 : LARGEST;
    if (length <= BUFFER && hold(r, 'memory', length, MEMORY)) {
        return 'memory';
    }
    return length > FILED && hold(r, 'disk', length, settings.bodies) ? 'disk' : '';
}

function hold(r, place, bytes, most) {
    const key = 'body:' + place;
    if (fleet.count(key, bytes) > most) {
        fleet.count(key, -bytes);
        return false;
    }
    r.variables.body = place + ' ' + bytes;
    return true;
}

// The body is there, and so long.
function settle(r, length) {
    const [place, bytes] = (r.variables.body || '').split(' ');
    if (bytes && Number(bytes) !== length) {
        fleet.count(`body:${place}`, length - bytes);
        r.variables.body = `${place} ${length}`;
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

// The request is over.
function over(r) {
    const held = r.variables.body;
    if (held) {
        free(held);
    }
}

function free(held) {
    const at = held.indexOf(' ');
    fleet.count('body:' + held.slice(0, at), -held.slice(at));
}

export default { take, settle, begun, over };
