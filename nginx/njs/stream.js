// A stream that breaks off says so: the client gets an error event instead of a silent end.
//
// js_body_filter of what a replica answers. When the connection to the replica is lost, Nginx flushes what it has without
// marking an end; $upstream_response_time has its value by then, which tells this flush from those before.
// Only whole lines are passed on, so that the error does not end up inside one that was cut.

import answers from './answers.js';
import metrics from './metrics.js';

const NEWLINE = 10;
const NOTHING = Buffer.alloc(0);

function lost(r) {
    const time = r.variables.upstream_response_time;
    return time !== undefined && !time.endsWith('-');
}

// js_header_filter. Nginx' own page about a body that it could not read is the only 400 that no replica gave.
function begin(r) {
    if (r.status === 400 && r.variables.upstream_status === undefined) {
        r.unread = true;
        r.headersOut['Content-Type'] = 'application/json';
        delete r.headersOut['Content-Length'];
    }
}

function pass(r, data, flags) {
    if (r.unread) {
        // The page may come in pieces; the answer takes the place of its end.
        r.sendBuffer(flags.last ? answers.page(r, 400) : NOTHING, flags);
        return;
    }
    if (r.held === undefined) {
        if (!(r.headersOut['Content-Type'] || '').startsWith('text/event-stream')) {
            r.sendBuffer(data, flags);
            r.done();
            return;
        }
        r.held = NOTHING;
    }
    if (flags.last) {
        r.sendBuffer(Buffer.concat([r.held, data]), flags);
    } else if (!data.length && lost(r)) {
        metrics.cut(r.variables.replica);
        const error = answers.error(r, 502, 'stream_lost', `The replica ${r.variables.replica} was lost while it answered.`);
        // Not marked as the end: the client must not think that this connection can be used again.
        r.sendBuffer(`\ndata: ${error}\n\n`, { flush: true });
    } else if (!r.held.length && data[data.length - 1] === NEWLINE) {
        r.sendBuffer(data, { flush: true });
    } else {
        const bytes = Buffer.concat([r.held, data]);
        const end = bytes.lastIndexOf(NEWLINE) + 1;
        r.held = bytes.subarray(end);
        r.sendBuffer(bytes.subarray(0, end), { flush: true });
    }
}

export default { begin, pass };
