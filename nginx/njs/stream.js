// A stream that breaks off says so: the client gets an error event instead of a silent end.
//
// js_body_filter of what a replica answers. When the connection to the replica is lost, Nginx flushes what it has without
// marking an end; $upstream_response_time has its value by then, which tells this flush from those before.
// Only whole events are passed on, so that the error does not end up inside one that was cut.

import answers from './answers.js';
import budget from './budget.js';
import fleet from './fleet.js';
import metrics from './metrics.js';
import usage from './usage.js';

const NEWLINE = 10;
const RETURN = 13;
const COLON = 58;
const BLANK = Buffer.from('\n\n');
const NOTHING = Buffer.alloc(0);
// Bytes of one stream that may lie here: an event that is not whole yet, or what the client has not read. Beyond that the
// stream goes on without njs, as then Nginx takes no more from the replica than the client reads. Where usage has to be taken
// out that is put off for as long as there is room.
const MOST = 256 * 1024;
const STRIPPED = 4 * 1024 * 1024;

function lost(r) {
    const time = r.variables.upstream_response_time;
    return time !== undefined && !time.endsWith('-');
}

// Where the last whole event of these bytes ends; 0 if none does. A blank line ends an event.
function end(bytes) {
    for (let at = bytes.lastIndexOf(NEWLINE); at > 0; at = bytes.lastIndexOf(NEWLINE, at - 1)) {
        if (bytes[at - 1] === NEWLINE || at > 1 && bytes[at - 1] === RETURN && bytes[at - 2] === NEWLINE) {
            return at + 1;
        }
    }
    return 0;
}

// js_header_filter. A stream's header comes with its first token, so the replica has computed the prompt, unless it says that
// it only keeps the connection (vllm/begin.py); a whole answer's comes with its end. Nginx' own page about a body that it could
// not read is the only 400 that neither a replica nor njs gave.
function begin(r) {
    const chosen = r.chosen;
    // An internal redirect has lost what was chosen; the variables stay. Only after one is there a body on disk.
    const stream = chosen ? chosen.stream : r.variables.stream;
    if (!chosen) {
        budget.begun(r);
    }
    if (stream && r.variables.upstream_http_x_waiting) {
        r.waiting = true;
    } else if (stream) {
        computed(r);
    }
    if (r.status === 400 && r.variables.upstream_status === undefined && !r.answered) {
        r.unread = true;
        r.headersOut['Content-Type'] = 'application/json';
        delete r.headersOut['Content-Length'];
    }
}

// The replica has computed the prompt.
function computed(r) {
    r.waiting = false;
    const variables = r.variables;
    variables.ttft = variables.request_time;
    const work = r.chosen ? r.chosen.work : Number(variables.work);
    if (work && variables.replica) {
        fleet.begun(variables.replica, work);
        variables.work = 0;
        if (r.chosen) {
            r.chosen.work = 0;
        }
    }
}

// Whether the last of these whole events is a comment.
function isComment(bytes) {
    const before = bytes.lastIndexOf(BLANK, bytes.length - 3);
    return bytes[before < 0 ? 0 : before + 2] === COLON;
}

function send(r, data) {
    r.sendBuffer(data, { flush: true });
    r.passed += data.length;
    // What was sent is asked for now and then only: it costs as much as all else here.
    if (r.passed - r.asked <= MOST) {
        return true;
    }
    r.asked = r.passed;
    const behind = r.passed - Number(r.variables.bytes_sent);
    while (behind > r.room && r.room < STRIPPED && usage.strips(r) && budget.more(r, MOST)) {
        r.room += MOST;
    }
    return behind <= r.room;
}

// Passes on what ends an event, and holds the rest; whether it may go on.
function forward(r, data) {
    // The blank line may lie on the border between what is held and what comes.
    const seam = r.size ? Buffer.concat([r.border, data]) : data;
    const at = end(seam) - (seam.length - data.length);
    if (at <= 0) {
        r.held.push(Buffer.from(data));
        r.size += data.length;
        r.border = Buffer.from(seam.subarray(-2));
        return r.size <= MOST;
    }
    const last = at === data.length ? data : data.subarray(0, at);
    const whole = r.size ? Buffer.concat([...r.held, last]) : last;
    if (r.waiting && !isComment(whole)) {
        computed(r);
    }
    r.taken += whole.length;
    const more = send(r, usage.events(r, whole));
    const rest = Buffer.from(data.subarray(at));
    r.held = rest.length ? [rest] : [];
    r.size = rest.length;
    r.border = rest.subarray(-2);
    return more;
}

function pass(r, data, flags) {
    if (r.unread) {
        // The page may come in pieces; the answer takes the place of its end.
        r.sendBuffer(flags.last ? answers.page(r, 400) : NOTHING, flags);
        return;
    }
    if (r.whole) {
        r.sendBuffer(data, flags);
        usage.piece(r, data);
        return;
    }
    if (r.held === undefined) {
        const headers = r.headersOut;
        if (!(headers['Content-Type'] || '').startsWith('text/event-stream')) {
            r.sendBuffer(data, flags);
            const only = data.length === Number(headers['Content-Length']);
            const well = r.status === 200;
            if (well) {
                r.whole = true;
                usage.piece(r, data, only);
            }
            if (!well || only) {
                r.done();
            }
            return;
        }
        r.held = [];
        r.size = r.passed = r.asked = r.taken = 0;
        r.room = MOST;
    }
    if (flags.last) {
        r.sendBuffer(usage.events(r, Buffer.concat([...r.held, data])), flags);
    } else if (!data.length) {
        if (lost(r)) {
            metrics.cut(r.variables.replica);
            r.cut = true;
            r.variables.cut = 'true';
            // Not marked as the end: the client must not think that this connection can be used again.
            r.sendBuffer(answers.lost(r), { flush: true });
        }
    } else if (!forward(r, data)) {
        if (r.waiting) {
            computed(r);
        }
        r.sendBuffer(Buffer.concat(r.held), { flush: true });
        r.left = true;
        r.done();
    }
}

export default { begin, pass };
