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
    const headers = r.headersIn;
    const length = headers['Content-Length'] === undefined
        ? headers['Transfer-Encoding'] === undefined && r.httpVersion < '2' ? 0 : LARGEST
        : Number(headers['Content-Length']);
    if (length <= BUFFER && hold(r, 'memory', length, MEMORY)) {
        return 'memory';
    }
    return length > FILED && hold(r, 'disk', length, settings.bodies) ? 'disk' : '';
}

function hold(r, place, bytes, most) {
    if (fleet.count(`body:${place}`, bytes) > most) {
        fleet.count(`body:${place}`, -bytes);
        return false;
    }
    r.variables.body = `${place} ${bytes}`;
    return true;
}

// The body is there, and so long.
function settle(r, length) {
    const [place, bytes] = r.variables.body.split(' ');
    fleet.count(`body:${place}`, length - bytes);
    r.variables.body = `${place} ${length}`;
}

// The answer begins.
function begun(r) {
    if ((r.variables.body || '').startsWith('disk')) {
        release(r);
    }
}

// The request is over.
function release(r) {
    const held = r.variables.body;
    if (held) {
        const [place, bytes] = held.split(' ');
        fleet.count(`body:${place}`, -bytes);
        r.variables.body = '';
    }
}

export default { take, settle, begun, release };
