// The watch over the replicas. Both functions run in one worker only.
//
// `watch` looks at each replica once a second: does it live, what models has it, how much has it to do.
// `probe` sends real one-token requests where being alive does not say enough: to a replica that has just come, that fails
// request after request, that has work but has made no token for a while, or that has been idle for long. No answer: wedged. It
// comes back with its first token.

import fs from 'fs';
import fleet from './fleet.js';
import hosts from './hosts.js';
import metrics from './metrics.js';
import objectives from './objectives.js';
import parked from './parked.js';
import settings from './settings.js';
import sleep from './sleep.js';
import usage from './usage.js';

const shared = ngx.shared.fleet;

const LOOK_MS = 900;             // a look is over before the next one begins, or Nginx ends it and nothing of it counts
const MISSES = 3;                // looks without an answer; a busy replica may miss one
const MODELS_MS = 5000;          // adapters come and go at run time
const PATIENCE_MS = 3000;        // without a token, before a replica with work is asked for one
const PATIENCE_MOST_MS = 60000;
const IDLE_MS = 30000;
const FAILURES = 3;              // answers of 5xx in a row
const AGAIN_MS = 1000;           // between two one-token requests to a replica that gave no token
const BASES = 4;                 // models, without their adapters, that replicas are compared by
const NAME = 256;                // characters of a model's name that are kept for it
const TURN_MS = 295000;          // and four seconds more are less than js_periodic's interval: a turn is never cut short

const NAMES = {
    'vllm:num_requests_running': 'running',
    'vllm:num_requests_waiting': 'waiting',
    'vllm:kv_cache_usage_perc': 'kv',
    'vllm:prefix_cache_queries_total': 'queries',
    'vllm:prefix_cache_hits_total': 'hits',
    'vllm:prompt_tokens_total': 'prompt',
    'vllm:generation_tokens_total': 'tokens',
    'vllm:time_to_first_token_seconds_sum': 'ttft',
    'vllm:time_to_first_token_seconds_count': 'firsts',
};

const HISTOGRAMS = {
    'vllm:time_to_first_token_seconds_bucket': 'ttft_p95_seconds',
    'vllm:inter_token_latency_seconds_bucket': 'itl_p95_seconds',
};

// The metrics that count here, by short name, summed over a replica's engines (of KV use: the fullest one's). `timely`: of each
// latency that has an objective [how many kept it, how many there were].
function parse(text, objective) {
    const found = {};
    const histograms = {};
    for (const line of text.split('\n')) {
        if (line.startsWith('vllm:')) {
            const name = line.slice(0, line.search(/[{ ]/));
            const key = NAMES[name];
            if (key) {
                const value = Number(line.slice(line.lastIndexOf(' ') + 1));
                found[key] = key === 'kv' ? Math.max(found.kv || 0, value) : (found[key] || 0) + value;
            } else if (objective && HISTOGRAMS[name]) {
                const counts = histograms[HISTOGRAMS[name]] = histograms[HISTOGRAMS[name]] || {};
                const [, le] = /le="([^"]+)"/.exec(line) || [];
                const bound = le === '+Inf' ? Infinity : Number(le);
                counts[bound] = (counts[bound] || 0) + Number(line.slice(line.lastIndexOf(' ') + 1));
            }
        }
    }
    if (objective) {
        found.timely = {};
        for (const name of Object.keys(histograms)) {
            found.timely[name] = [objectives.within(histograms[name], objective[name]), histograms[name][Infinity] || 0];
        }
    }
    return found;
}

// One request to a replica: {status, text, date, sleep}; status 0 and the reason where there was no answer. `date` is its host's
// time, `sleep` what /health says of its sleep mode.
async function ask(replica, path, body) {
    const options = { headers: { 'X-Gateway-Probe': '1' } };
    if (body) {
        options.method = 'POST';
        options.body = JSON.stringify(body);
        options.headers['Content-Type'] = 'application/json';
    }
    try {
        const answer = await ngx.fetch(`http://${replica.host}${path}`, options);
        const text = await answer.text();
        // The link's own word (nginx/link): the request got no further.
        const there = answer.headers.get('X-Refusal') !== 'unreachable';
        return { status: there ? answer.status : 0, text, date: answer.headers.get('Date'), sleep: answer.headers.get('X-Sleep') };
    } catch (e) {
        return { status: 0, text: String(e.message) };
    }
}

// ---- once a second

async function look(replica) {
    const name = replica.name;
    const old = fleet.record(name);
    const began = fleet.clock();
    const due = began - (old.asked || 0) > MODELS_MS;
    // Looking up the name, connecting and reading have a limit each; together they must not take longer than this.
    let timer = null;
    const late = new Promise((resolve) => {
        timer = setTimeout(() => {
            timer = null;
            resolve({ status: 0, text: 'timed out' });
        }, LOOK_MS);
    });
    const [health, measured, models, version] = await Promise.all([
        ask(replica, '/health'), ask(replica, '/metrics'), due ? ask(replica, '/v1/models') : null,
        due ? ask(replica, '/version') : null,
    ].map((asked) => Promise.race([asked, late])));
    // The turn lasts as long as a timer is pending; one that has fired cannot be cleared.
    if (timer !== null) {
        clearTimeout(timer);
    }
    const now = Object.assign({}, old, { misses: 0, at: began });
    if (health.status === 200) {
        now.alive = true;
        now.late = false;
        now.ever = true;
        now.reason = '';
        now.sleep = sleep.told(health.sleep);
        const down = fleet.get(`down:${name}`);
        if (down && down.at < began) {
            shared.delete(`down:${name}`);
            shared.delete(`probe:${name}`);
        }
    } else if (health.status) {
        now.alive = false;
        now.late = false;
        now.state = 'loading';
        now.reason = `/health says ${health.status}`;
    } else {
        now.misses = (old.misses || 0) + 1;
        now.reason = health.text;
        const refused = health.text === 'connect failed';
        now.late = health.text.includes('timed out');
        if (!now.late || now.misses >= MISSES) {
            now.alive = false;
            // Nobody listens yet: a replica opens its port when its model is loaded.
            now.state = refused && !old.ever ? 'loading' : 'unreachable';
        }
    }
    if (now.alive && models && models.status === 200) {
        list(replica, now, models.text);
    }
    if (now.alive && version && version.status === 200) {
        identify(now, version);
    }
    // It answers a one-token request before it is ready again.
    if (!now.alive || now.sleep && now.sleep.state !== 'awake') {
        shared.delete(`probe:${name}`);
    }
    if (!now.alive) {
        // What is stopped on purpose loads when it is started again, as if for the first time.
        now.ever = now.ever && !fleet.get('parked', []).includes(name);
        now.metrics = {};
        now.asked = 0;
    } else if (measured.status === 200) {
        measure(replica, now, old, parse(measured.text, objectives.of(now.model)));
    }
    metrics.looked(name, health.status === 200);
    fleet.set(`look:${name}`, now);
}

// Takes a replica's version, and how many seconds its host's clock is ahead of this one's, into the record `now`.
function identify(now, { text, date }) {
    try {
        now.version = String(JSON.parse(text).version);
    } catch (e) {
        now.version = '';
    }
    now.ahead = hosts.ahead(date);
}

// The cards in the text of a /v1/models, or null where it is no list of models.
function cardsIn(text) {
    try {
        const cards = JSON.parse(text).data;
        return cards.every((card) => card.id && typeof card.id === 'string') ? cards : null;
    } catch (e) {
        return null;
    }
}

// Takes a replica's models into the record `now`.
function list(replica, now, text) {
    const found = cardsIn(text);
    const cards = found || [];
    const complaint = cards.length ? '' : found ? 'its /v1/models lists none' : 'its /v1/models is no list of models';
    if (complaint && complaint !== now.complaint) {
        ngx.log(ngx.WARN, `${replica.name}: ${complaint}`);
    }
    now.complaint = complaint;
    now.model = cards.length ? cards[0].id : '';
    now.bases = {};
    cards.filter((card) => !card.parent).slice(0, BASES).forEach(({ id, root, max_model_len }) => {
        now.bases[id.slice(0, NAME)] = `${String(root).slice(0, NAME)} with ${max_model_len} tokens`;
    });
    now.asked = now.at;
    if (!fleet.learn(replica.name, cards)) {
        now.alive = false;
        now.state = 'unreachable';
        now.reason = 'the gateway has no room for the names of its models';
    }
}

// Takes new metrics into the record `now`, and says what they tell of progress.
function measure(replica, now, old, found) {
    const before = old.metrics;
    const seconds = (now.at - old.at) / 1000;
    const made = found.tokens - before.tokens;
    const firsts = found.firsts - before.firsts;
    found.rate = made >= 0 && seconds > 0 ? made / seconds : 0;
    // Until the next first token the last one stands.
    found.ttft_ms = firsts > 0 ? (found.ttft - before.ttft) / firsts * 1000 : before.ttft_ms;
    now.metrics = found;

    const busy = found.running > 0 || found.waiting > 0 || fleet.inFlight(replica.name) > 0;
    const moved = found.tokens !== before.tokens || found.prompt !== before.prompt;
    now.busy = busy;
    if (moved || !busy || found.tokens === undefined) {
        const verdict = fleet.get(`probe:${replica.name}`);
        if (moved && verdict && !verdict.ok) {
            // It was slow, not wedged: it gets more time from now on.
            now.patience = Math.min(PATIENCE_MOST_MS, 2 * (now.at - old.progress));
            fleet.set(`probe:${replica.name}`, { ok: true, at: now.at });
        }
        now.progress = now.at;
    }
    if (moved) {
        now.token = now.at;
    }
}

async function watch() {
    fleet.forgetDeadWorkers();
    fleet.set('parked', parked.names());
    const replicas = fleet.read();
    await Promise.all(replicas.map((replica) => look(replica).catch((e) => {
        ngx.log(ngx.ERR, `looking at ${replica.name}: ${e.message}`);
        // What it was may not be so any more.
        shared.delete(`look:${replica.name}`);
    })));
    fleet.publish();
}

// ---- one token

// Why the replica should be asked for a token now, or ''.
function need(name, now) {
    const record = fleet.record(name);
    if (!record.alive || !record.model || record.sleep && record.sleep.state !== 'awake') {
        return '';
    }
    const last = fleet.get(`probe:${name}`);
    if (!last) {
        return 'new';
    }
    if (now - last.at < AGAIN_MS) {
        return '';
    }
    if (!last.ok) {
        return 'wedged';
    }
    if (fleet.failures(name) >= FAILURES) {
        return 'failing';
    }
    if (record.busy) {
        return now - Math.max(record.progress, last.at) > (record.patience || PATIENCE_MS) ? 'no progress' : '';
    }
    return now - Math.max(record.token || 0, last.at) > IDLE_MS ? 'idle' : '';
}

// The tokens that an answer says it took.
function tokensIn(text) {
    try {
        const { prompt, completion } = usage.counts('', JSON.parse(text).usage);
        return prompt + completion;
    } catch (e) {
        return 0;
    }
}

async function oneToken(replica) {
    const { model } = fleet.record(replica.name);
    const began = fleet.clock();
    let answer = await ask(replica, '/v1/completions', { model, prompt: 'a', max_tokens: 1, user: 'gateway-probe' });
    if (answer.status >= 400 && answer.status < 500) {
        answer = await ask(replica, '/v1/embeddings', { model, input: 'a', user: 'gateway-probe' });
    }
    const ok = answer.status >= 200 && answer.status < 500;
    metrics.probed(replica.name, ok, tokensIn(answer.text));
    // Answered for: it takes as many again until the next one-token request is due.
    fleet.answered(replica.name, 200);
    // Full is not wedged: what it was stays.
    if (answer.status !== 503) {
        const seconds = ((fleet.clock() - began) / 1000).toFixed(1);
        const reason = ok ? '' : `no token for a one-token request in ${seconds} s (${answer.status || answer.text})`;
        fleet.set(`probe:${replica.name}`, { ok, at: fleet.clock(), reason });
        fleet.publish();
    }
}

// A worker that Nginx has told to end says so in its title. It stays while anything is pending, so a turn ends then.
function ending() {
    return fs.readFileSync('/proc/self/cmdline', 'utf8').includes('shutting down');
}

async function probe() {
    const turn = String(fleet.clock() + Math.random());
    const end = fleet.clock() + TURN_MS;
    const running = new Set();
    if (settings.complaint) {
        ngx.log(ngx.WARN, settings.complaint);
    }
    // Another turn that began later, in a new worker, takes over.
    fleet.put('fleet', 'turn', turn);
    while (fleet.clock() < end && (shared.get('turn') || turn) === turn && !ending()) {
        try {
            for (const replica of fleet.read()) {
                if (!running.has(replica.name) && need(replica.name, fleet.clock())) {
                    running.add(replica.name);
                    oneToken(replica).catch((e) => ngx.log(ngx.ERR, `probing ${replica.name}: ${e.message}`))
                        .finally(() => running.delete(replica.name));
                }
            }
        } catch (e) {
            // The fleet's files may be in the middle of a change; the turn goes on.
            ngx.log(ngx.ERR, `probing: ${e.message}`);
        }
        await new Promise((resolve) => setTimeout(resolve, 200));
    }
}

export default { watch, probe, parse };
