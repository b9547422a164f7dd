// What callers may use: requests and tokens a minute, tokens a day and a month, requests at once, and the size of one request.
//
// `enter` takes a place among the requests at once before a body is read, so that a slow upload is one too. `admit` takes from
// each other limit what the request may need at most, or gives all back and says which limit stands against it.
// Tokens are only reserved then, apart from those used, as places are; `settle` makes of them what was used when the request is
// over. Reservations end with their worker, while what was used is kept in a file. Adding is atomic, and what is taken is added
// first and looked at then: so all workers together never let in more than a limit says. Windows are the clock's: minutes, days
// and months of UTC.
//
// What nobody limits is shared: who floods the fleet comes after the others in the replicas' queues, by the priority of `admit`,
// and leaves them a replica, by `shareOf`.

import fleet from './fleet.js';
import texts from './texts.js';
import usage from './usage.js';

const zones = fleet.zones;

const MINUTE = 60000;
const DAY = 86400000;
const HELD = 62 * DAY;      // ms that a count of what is held is kept after the last change
const BYTES = 4;            // of a request's text for a token
const ID = 8;               // bytes, at most, of a token that is given as a number
const MEDIA = 1500;         // tokens for a picture or a sound
const RATE = 200;           // tokens a second, at most, that a replica makes of one answer
const ROUNDS = 8;
const LANE = 1000;          // between the priorities of two lanes
const QUOTAS = /^\{"name":.*"tokens_per_(day|month)":/;
const TOLD_FROM = 0.5;      // of a quota
const TOLD = 1000;          // series of keys near their quota
const FEW = 4;              // requests in flight for each replica: who has more floods
const UNSIZED = { prompt: 0, answer: 0, answers: 1, total: 0, given: true };

// name: letter of its counters, how long they are kept
const WINDOWS = {
    requests_per_minute: { letter: 'r', ms: MINUTE, kept: 2 * MINUTE },
    tokens_per_minute: { letter: 'm', ms: MINUTE, kept: 2 * MINUTE },
    tokens_per_day: { letter: 'd', ms: DAY, kept: 2 * DAY },
    tokens_per_month: { letter: 'M', ms: 0, kept: 62 * DAY },
};
const NAMES = Object.keys(WINDOWS);
const TOKENS = ['tokens_per_minute', 'tokens_per_day', 'tokens_per_month'];
const SPANS = { requests_per_minute: 'a minute', tokens_per_minute: 'a minute', tokens_per_day: 'a day', tokens_per_month: 'a month' };

// The fields that say how long an answer may get; of several the first that is there counts.
const LONGEST = {
    '/v1/chat/completions': ['max_completion_tokens', 'max_tokens'],
    '/v1/chat/completions/batch': ['max_completion_tokens', 'max_tokens'],
    '/v1/completions': ['max_tokens'],
    '/v1/responses': ['max_output_tokens'],
    '/v1/messages': ['max_tokens'],
    '/v1/systemone': ['max_completion_tokens', 'max_tokens'],
    '/v1/audio/transcriptions': ['max_completion_tokens'],
    '/v1/audio/translations': ['max_completion_tokens'],
};
const OTHERWISE = { '/v1/completions': 16 };   // as vLLM has it; of the others: as far as the context goes
// The field of a prompt that may be given as tokens' numbers.
const PROMPT = { '/v1/completions': 'prompt', '/v1/embeddings': 'input', '/pooling': 'input', '/classify': 'input' };

// ---- how large a request is

// The number that a field gives, as the replica reads it: undefined if it gives none, NaN if that is not certain.
function numberIn(value) {
    if (value === null || value === undefined) {
        return undefined;
    }
    const number = typeof value === 'number' || typeof value === 'string' && /^\s*\d+\s*$/.test(value) ? Number(value) : NaN;
    return Number.isSafeInteger(number) ? number : NaN;
}

// Bytes of pictures and sounds in the parts of messages, and how many there are: no text.
function media(messages) {
    let count = 0;
    let size = 0;
    for (const message of Array.isArray(messages) ? messages : []) {
        for (const part of message && Array.isArray(message.content) ? message.content : []) {
            if (part && part.type !== 'text' && typeof part === 'object') {
                const { image_url: image, input_audio: sound, video_url: film, source } = part;
                const data = image && (image.url || image) || sound && sound.data || film && film.url || source && source.data || part.image_url;
                if (typeof data === 'string') {
                    count++;
                    size += texts.lengthOf(data);
                }
            }
        }
    }
    return { count, size };
}

// How many prompts a body holds, and how many tokens where they are given as numbers.
function prompts(uri, body) {
    if (uri.endsWith('/batch')) {
        return { count: Array.isArray(body.messages) && body.messages.length || 1, tokens: 0 };
    }
    const given = body[PROMPT[uri]];
    if (!Array.isArray(given) || !given.length) {
        return { count: 1, tokens: 0 };
    }
    if (typeof given[0] === 'number') {
        return { count: 1, tokens: given.length };
    }
    return { count: given.length, tokens: given.reduce((sum, one) => sum + (Array.isArray(one) ? one.length : 0), 0) };
}

// {bytes, prompt: tokens, answer: tokens of each at most, given: whether the request says so, answers: how many, total: tokens at
// most, wrong: the first field that is no whole number}. The prompt is estimated, and no longer than the model's context: a
// replica refuses what is longer.
function sizeOf(uri, body, bytes, context) {
    const fields = LONGEST[uri];
    const { count, tokens } = prompts(uri, body);
    let prompt = 0;
    if (!usage.UNCOUNTED.test(uri) && !uri.startsWith('/v1/audio/')) {
        const { count: pieces, size } = media(body.messages || body.input);
        // Whatever is no token's number may be text of the prompt.
        prompt = tokens + Math.ceil(Math.max(bytes - size - tokens * ID, 0) / BYTES) + pieces * MEDIA;
    }
    if (!fields) {
        return { bytes, prompt, answer: 0, given: true, answers: 1, total: prompt };
    }
    // Several prompts may each be as long as the context.
    prompt = Math.min(prompt, context * count);
    let said;
    let wrong = '';
    for (const field of fields) {
        const value = numberIn(body[field]);
        if (Number.isNaN(value)) {
            wrong = wrong || field;
        } else if (said === undefined && value >= 0) {
            // One below 0 is refused by the replica.
            said = value;
        }
    }
    const n = numberIn(body.n);
    const best = numberIn(body.best_of);
    wrong = wrong || (Number.isNaN(n) ? 'n' : Number.isNaN(best) ? 'best_of' : '');
    if (wrong) {
        return { bytes, prompt, answer: 0, given: true, answers: 1, total: prompt, wrong };
    }
    const otherwise = OTHERWISE[uri];
    const each = n ?? 1;
    // The prompt leaves less of the context, but padding could make it seem to leave none.
    const answer = Math.min(said ?? otherwise ?? Infinity, context);
    const answers = Math.max(each, best ?? 0, 1) * count;
    return {
        bytes,
        prompt,
        answer,
        given: said !== undefined || otherwise !== undefined,
        answers,
        total: answers === 1 ? Math.min(prompt + answer, context) : prompt + answer * answers,
        each,
    };
}

// ---- the counters

// {letter, id, ends} of the window that this time is in.
function windowOf(name, now) {
    const { ms } = WINDOWS[name];
    if (ms) {
        const id = Math.floor(now / ms);
        return { id, ends: (id + 1) * ms };
    }
    const date = new Date(now);
    const month = date.getUTCFullYear() * 12 + date.getUTCMonth();
    return { id: month, ends: Date.UTC(date.getUTCFullYear(), date.getUTCMonth() + 1, 1) };
}

// Adds to a counter and gives its value. Where its zone has no room, those who find none share a counter of another one: that
// neither lets them do as they like nor shuts them out.
function add(counter, amount) {
    try {
        return zones[counter.zone].incr(counter.key, amount, 0, counter.kept);
    } catch (e) {
        fleet.lost(counter.zone, e);
        counter.zone = 'beyond';
        counter.key = counter.shared;
        return zones.beyond.incr(counter.key, amount, 0, counter.kept);
    }
}

function valueOf(counter) {
    return zones[counter.zone].get(counter.key) || 0;
}

// Takes between `least` and `most` from a limit of which another counter may have used some: [how much, what is left], or null.
// Another may take and give back in between, so it is tried again as long as there seems to be room.
function take(counter, limit, least, most, used) {
    for (let round = 0; round < ROUNDS; round++) {
        const amount = Math.min(most, limit - valueOf(counter) - (used ? valueOf(used) : 0));
        if (amount < least) {
            return null;
        }
        // `settle` adds to what is used first, and gives back then: this order misses neither.
        const left = limit - add(counter, amount) - (used ? valueOf(used) : 0);
        if (left >= 0) {
            return [amount, left];
        }
        add(counter, -amount);
    }
    return null;
}

function counterOf(party, name, now) {
    const { letter, kept } = WINDOWS[name];
    const { id, ends } = windowOf(name, now);
    return { zone: party.zone, key: `${letter}${id}|${party.who}`, shared: letter + id, kept, ends };
}

const pid = ` ${process.pid}`;

// Counts what this worker holds of a counter, to be taken back if it is killed (fleet.forgetDeadWorkers).
function note({ zone, key }, amount) {
    const dictionary = zones[zone];
    const own = key + pid;
    try {
        if (dictionary.incr(own, amount, 0) <= 0) {
            dictionary.delete(own);
        }
    } catch (e) {
        fleet.lost(zone, e);
    }
}

// Takes as `take` does what `release` gives back.
function hold(counter, limit, least, most, used) {
    const got = take(counter, limit, least, most, used);
    if (got && got[0] > 0) {
        note(counter, got[0]);
    }
    return got;
}

function release(counter, amount) {
    note(counter, -amount);
    fleet.drop(counter.zone, counter.key, amount);
}

function slotOf(party) {
    return { zone: party.held, key: party.who, shared: 'slots', kept: HELD };
}

// The tokens reserved in the window of this counter.
function reservedOf(party, { key, shared }) {
    return { zone: party.held, key, shared: `reserved-${shared}`, kept: HELD };
}

// ---- one request

// A span of time as OpenAI writes it: 12ms, 3s, 1m3s, 2h0m1s.
function duration(ms) {
    if (ms < 1000) {
        return `${Math.max(Math.ceil(ms), 0)}ms`;
    }
    const seconds = Math.ceil(ms / 1000);
    const [h, m, s] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, seconds % 60];
    return `${h ? `${h}h` : ''}${h || m ? `${m}m` : ''}${s}s`;
}

// Those whose limits a request has to keep: the key's holder, and the end user that it names.
function partiesOf(holder, endUser) {
    const parties = [];
    if (holder.name) {
        parties.push({ who: holder.name, token: holder.token, limits: holder.limits, zone: 'limits', held: 'slots' });
    }
    if (endUser) {
        const limits = JSON.parse(ngx.shared.keys.get('end_users') || '{}');
        if (Object.keys(limits).length) {
            parties.push({ who: `${holder.name}/${endUser}`, limits, zone: 'end_users', held: 'user_slots' });
        }
    }
    return parties;
}

// What a refusal calls a party.
function called({ who, token, zone }) {
    return zone === 'limits' ? `The ${token ? 'user' : 'key'} ${who}` : 'This end user';
}

function refusal(status, code, message, more) {
    return { refused: Object.assign({ status, code, message, cause: 'limit' }, more) };
}

// What of one request is larger than may be.
function oversize(party, size) {
    const { limits } = party;
    if (size.wrong && Object.keys(limits).length) {
        return refusal(400, 'invalid_number', `${size.wrong} is no whole number: write it in digits.`, { param: size.wrong });
    }
    if (size.bytes > limits.body_bytes) {
        return refusal(413, 'limit_exceeded', `${called(party)} may send bodies of ${limits.body_bytes} bytes at most, and this one has ${size.bytes}.`);
    }
    if (size.prompt > limits.prompt_tokens) {
        return refusal(400, 'limit_exceeded', `${called(party)} may send prompts of ${limits.prompt_tokens} tokens at most, and this one has `
            + `about ${size.prompt}.`);
    }
    if (size.each > limits.n) {
        return refusal(400, 'limit_exceeded', `${called(party)} may ask for ${limits.n} answers at once at most, not ${size.each}.`, { param: 'n' });
    }
    if (size.answer > limits.max_tokens) {
        return refusal(400, 'limit_exceeded', `${called(party)} may ask for answers of ${limits.max_tokens} tokens at most: `
            + `${size.given ? `this request asks for ${size.answer}` : 'set max_tokens'}.`, { param: 'max_tokens' });
    }
    return null;
}

function spent(party, name, limit, counter, used, need, now) {
    const left = counter.ends - now;
    const quota = name === 'tokens_per_day' || name === 'tokens_per_month';
    const span = SPANS[name];
    if (name !== 'requests_per_minute' && need > limit) {
        return refusal(429, 'rate_limit_exceeded', `${called(party)} may use ${limit} tokens ${span}, and this request may need ${need}: `
            + 'make it shorter, or set a lower max_tokens.', { never: true });
    }
    if (name !== 'requests_per_minute' && used + need <= limit) {
        return refusal(429, 'rate_limit_exceeded', `${called(party)} may use ${limit} tokens ${span} (${name}), and its requests on `
            + 'their way may need what is left: try again when one is over.', { after: 1 });
    }
    const unit = name === 'requests_per_minute' ? 'requests' : 'tokens';
    return refusal(429, quota ? 'insufficient_quota' : 'rate_limit_exceeded', `${called(party)} may use ${limit} ${unit} ${span} (${name}), `
        + `and has no room left for this request: again in ${duration(left)}.`,
    { never: quota, after: Math.max(Math.ceil(left / 1000), 1), cause: quota ? 'quota' : 'limit' });
}

// What the headers tell of the limit that leaves least: [limit, remaining, ms to its end]. Of two the first, where both leave as
// much.
function tighter(found, limit, left, ms) {
    return found && found[1] <= left ? found : [limit, left, ms];
}

function tell(r, unit, found) {
    if (found) {
        const [limit, remaining, ms] = found;
        const variables = r.variables;
        variables[`limit_${unit}`] = String(limit);
        variables[`remaining_${unit}`] = String(Math.max(remaining, 0));
        variables[`reset_${unit}`] = duration(ms);
    }
}

// The window that leaves least of these.
function tightest(parties, names, now) {
    let found = null;
    for (const party of parties) {
        for (const name of names) {
            const limit = party.limits[name];
            if (limit !== undefined) {
                const counter = counterOf(party, name, now);
                const held = WINDOWS[name].letter === 'r' ? 0 : valueOf(reservedOf(party, counter));
                found = tighter(found, limit, limit - valueOf(counter) - held, counter.ends - now);
            }
        }
    }
    return found;
}

// Takes the places of a request whose body is yet to come: {refused} where there are none, or where it says that it is too long.
// What was taken is noted in $taken.
function enter(r, holder) {
    const parties = partiesOf(holder, r.variables.end_user);
    r.parties = parties;
    const taken = [];
    let refused = null;
    for (const party of parties) {
        refused = refused || oversize(party, { bytes: Number(r.headersIn['Content-Length']) }) || place(party, taken);
    }
    if (refused) {
        giveBack(taken);
        tellAll(r, parties, Date.now());
        return refused;
    }
    if (taken.length) {
        keep(r, { prompt: 0, answers: 1, list: taken });
    }
    return {};
}

// Notes what a request has taken: {prompt, answers, list of {held, counted, amount}}. An internal redirect loses all but the
// variable. None of its words holds a space, and JSON would cost as much as the taking itself.
function keep(r, taken) {
    let text = `${taken.prompt} ${taken.answers}`;
    for (const { held, counted, amount } of taken.list) {
        text += held ? ` ${amount} ${held.zone} ${held.key}` : ` ${amount} - -`;
        text += counted ? ` ${counted.zone} ${counted.key} ${counted.shared} ${counted.kept} ${counted.ends}` : ' - - - - -';
    }
    r.reserved = taken;
    r.variables.taken = text;
}

// What a request has taken, or null.
function kept(r) {
    if (r.reserved) {
        return r.reserved;
    }
    const text = r.variables.taken;
    if (!text) {
        return null;
    }
    const [prompt, answers, ...words] = text.split(' ');
    const list = [];
    for (let at = 0; at < words.length; at += 8) {
        const [amount, heldZone, heldKey, zone, key, shared, keptFor, ends] = words.slice(at, at + 8);
        list.push({
            held: heldZone === '-' ? undefined : { zone: heldZone, key: heldKey },
            counted: zone === '-' ? undefined : { zone, key, shared, kept: Number(keptFor), ends: Number(ends) },
            amount: Number(amount),
        });
    }
    return { prompt: Number(prompt), answers: Number(answers), list };
}

// Takes a place of a party, noting it in `taken`; the refusal where it has none left, or null.
function place(party, taken) {
    const { limits } = party;
    // A holder's are counted in any case.
    if (limits.parallel_requests !== undefined || party.zone === 'limits') {
        const held = slotOf(party);
        if (!hold(held, limits.parallel_requests ?? Infinity, 1, 1)) {
            return refusal(429, 'rate_limit_exceeded', `${called(party)} may have ${limits.parallel_requests} requests at once `
                + '(parallel_requests), and has them.', { after: 1 });
        }
        taken.push({ held, amount: 1 });
    }
    return null;
}

function tellAll(r, parties, now) {
    tell(r, 'requests', tightest(parties, ['requests_per_minute'], now));
    tell(r, 'tokens', tightest(parties, TOKENS, now));
}

// Takes what else this request needs: {refused} where a limit stands against it.
function admit(r, holder, asked, model) {
    // An internal redirect has lost them.
    const parties = r.parties || partiesOf(holder, r.variables.end_user);
    if (!parties.length) {
        return {};
    }
    const now = Date.now();
    const limited = parties.some((party) => Object.keys(party.limits).length);
    const size = limited ? sizeOf(asked.as || r.uri, asked.body, Number(r.headersIn['Content-Length'] ?? r.variables.request_length),
        model && fleet.context(model) || Infinity) : UNSIZED;
    const before = kept(r);
    const taken = before ? before.list : [];
    const seen = { requests: null, tokens: null };
    const refused = limited ? takeAll(parties, size, now, taken, seen) : null;
    if (refused) {
        giveBack(taken, now);
        r.reserved = null;
        r.variables.taken = '';
        tellAll(r, parties, now);
        return refused;
    }
    // Without limits nothing has come to what `enter` noted.
    if (limited || !before) {
        keep(r, { prompt: size.prompt, answers: size.answers, list: taken });
    }
    // Within its lane each of a holder's requests comes after as many as it has already: who floods sinks by itself.
    r.variables.priority = String(holder.priority * LANE + Math.min(zones.slots.get(holder.name) || 0, LANE - 1));
    tell(r, 'requests', seen.requests);
    tell(r, 'tokens', seen.tokens);
    return {};
}

// Takes from one limit after the other what the request needs, noting in `taken` what to give back, and in `seen` which leaves
// least; the first refusal, or null.
function takeAll(parties, size, now, taken, seen) {
    for (const party of parties) {
        const wrong = oversize(party, size);
        if (wrong) {
            return wrong;
        }
    }
    const most = Math.max(size.total, 1);
    const least = size.given ? most : Math.min(size.prompt + 1, most);
    for (const party of parties) {
        for (const name of NAMES) {
            const limit = party.limits[name];
            if (limit === undefined) {
                continue;
            }
            const counted = counterOf(party, name, now);
            if (name === 'requests_per_minute') {
                const got = take(counted, limit, 1, 1);
                if (!got) {
                    return spent(party, name, limit, counted, 0, 1, now);
                }
                taken.push({ counted, amount: 1 });
                seen.requests = tighter(seen.requests, limit, got[1], counted.ends - now);
                continue;
            }
            // What is used needs its place before it is: where there is none, all share one.
            const used = add(counted, 0);
            const held = reservedOf(party, counted);
            const got = hold(held, limit, least, most, counted);
            if (!got) {
                return spent(party, name, limit, counted, used, least, now);
            }
            taken.push({ held, counted, amount: got[0] });
            seen.tokens = tighter(seen.tokens, limit, got[1], counted.ends - now);
        }
    }
    return null;
}

// Adds to a count, if its window still counts.
function correct(counted, by, now) {
    if (by && (now < counted.ends || counted.kept > 2 * MINUTE)) {
        add(counted, by);
    }
}

function giveBack(taken, now) {
    for (const { held, counted, amount } of taken) {
        if (held) {
            release(held, amount);
        } else {
            correct(counted, -amount, now);
        }
    }
}

// Those of the replicas in `list` that a holder's request may go to. No priority helps who waits for a step of an engine that is
// full of another's prompts. So who floods leaves the last replica to the others, for as long as there are any: who have asked
// for this model within a minute, the time-out of the zone, and had few requests in flight.
function shareOf(list, holder, model) {
    if (!holder.name || list.length < 2) {
        return list;
    }
    const own = `${holder.name} ${model}`;
    if (zones.slots.get(holder.name) <= FEW * list.length) {
        ngx.shared.modest.set(own, '');
        return list;
    }
    const others = ngx.shared.modest.keys(fleet.ALL).some((key) => key !== own && key.slice(key.indexOf(' ') + 1) === model);
    return others ? list.slice(0, -1) : list;
}

// The request is over. `used` is {prompt, completion} in tokens by the engine's word, or null if it gave none; `refused`,
// whether it came to nothing, so that it counts to no limit.
function settle(r, used, refused, began, seconds) {
    const taken = kept(r);
    if (!taken) {
        return;
    }
    const { prompt, answers, list } = taken;
    const now = Date.now();
    if (refused) {
        giveBack(list, now);
        return;
    }
    for (const { held, counted, amount } of list) {
        if (held && counted) {
            // Of one that broke off without a word: its prompt, and what can have been made in its time.
            // Nginx counts whole milliseconds, and this one had begun too.
            const guess = prompt + (began ? Math.ceil((seconds + 0.001) * RATE) * answers : 0);
            // So of a sound whose seconds alone it told.
            const spent = used && !used[usage.SECONDS] ? used.prompt + used.completion : -1;
            correct(counted, spent >= 0 ? spent : Math.min(amount, guess), now);
        }
        if (held) {
            release(held, amount);
        }
    }
}

// A holder's limits in force and what is used of them, for people.
function show(holder, endUser) {
    const found = {};
    const now = Date.now();
    for (const party of partiesOf(holder, endUser)) {
        const shown = {};
        for (const name of Object.keys(party.limits)) {
            const limit = party.limits[name];
            if (WINDOWS[name]) {
                const counter = counterOf(party, name, now);
                const used = valueOf(counter);
                const reserved = WINDOWS[name].letter === 'r' ? 0 : valueOf(reservedOf(party, counter));
                shown[name] = { limit, used, reserved, remaining: Math.max(limit - used - reserved, 0), reset: duration(counter.ends - now) };
            } else if (name === 'parallel_requests') {
                const used = valueOf(slotOf(party));
                shown[name] = { limit, used, remaining: Math.max(limit - used, 0) };
            } else {
                shown[name] = { limit };
            }
        }
        found[party.zone === 'limits' ? 'key' : 'end_user'] = shown;
    }
    return found;
}

// How much each key has used of its tokens a day and a month, of those that have used half or more, and of these the nearest to
// their end: [{key, quota, share}].
function quotas() {
    const now = Date.now();
    const found = new Map();
    for (const [, text] of ngx.shared.keys.items(fleet.ALL)) {
        if (QUOTAS.test(text)) {
            const { name: who, limits } = JSON.parse(text);
            for (const name of ['tokens_per_day', 'tokens_per_month']) {
                const share = limits && limits[name] ? valueOf(counterOf({ who, zone: 'limits' }, name, now)) / limits[name] : 0;
                if (share >= TOLD_FROM) {
                    const quota = name.slice('tokens_per_'.length);
                    // A key that is being rotated is there twice.
                    found.set(`${quota} ${who}`, { key: who, quota, share });
                }
            }
        }
    }
    return Array.from(found.values()).sort((one, other) => other.share - one.share).slice(0, TOLD);
}

export default { enter, admit, shareOf, settle, show, quotas, windowOf, duration };
