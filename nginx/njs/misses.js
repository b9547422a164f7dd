// Who breaks the cache: the prompts' tokens that a replica's cache should have had, and those of them that the engine did not
// find there, by the client's program and the key.

import fleet from './fleet.js';

const counters = ngx.shared.counters;

const KINDS = ['expected', 'missed'];
const SERIES = 1000;    // of program, key and model
const LONGEST = 256;    // characters of a model's name
const OTHER = 'other';  // what is beyond
// Tokens by which the engine may find less and miss nothing: it keeps whole blocks only, and what is expected is told in characters.
const BLOCK = 128;

let latest = '';    // the series that was counted last

// The labels of a series. Of these only a model's name may hold a space, and it comes last.
function series(client, key, model) {
    const labels = client + ' ' + key + ' ' + (model.length > LONGEST ? OTHER : model);
    if (labels === latest || counters.has('expected ' + labels)) {
        return latest = labels;
    }
    if ((counters.get('misses') || 0) >= SERIES) {
        return `${client} ${OTHER} ${OTHER}`;
    }
    add('misses', 1);
    add(`missed ${labels}`, 0);
    return labels;
}

function add(key, value) {
    try {
        counters.incr(key, value, 0);
    } catch (e) {
        fleet.lost('counters', e);
    }
}

// {expected, missed} of a prompt of which a cache should have this share; `used` is what the engine says.
function tokens(share, used) {
    const expected = Math.floor(share * used.prompt);
    const lacking = expected - used.cached;
    return { expected, missed: lacking > BLOCK ? lacking : 0 };
}

// A request is over of whose prompt a cache should have had this share, and its replica has said what it used.
function record(client, key, model, share, used) {
    const { expected, missed } = tokens(share, used);
    const labels = series(client, key, model);
    add('expected ' + labels, expected);
    if (missed) {
        add('missed ' + labels, missed);
    }
}

// The labels and the kind of a counter by its key, or null where it is another's.
function labelled(of) {
    const [kind, client, key, ...model] = of.split(' ');
    return KINDS.includes(kind) ? { kind, client, key, model: model.join(' ') } : null;
}

export default { KINDS, record, tokens, labelled };
