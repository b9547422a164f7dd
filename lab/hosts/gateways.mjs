// Prefix hits behind several gateways, in simulated time: the gateway's own policy (nginx/njs), each gateway with memories of its
// own, over replicas with a cache and a simple model of time. Reads {gateways, replicas, clients, requests, workload, seed,
// alone} as JSON from the command line, and prints what came of it; `alone`: no gateway is told of the others. lab/hosts/gateways.py runs it.

import crypto from 'node:crypto';
import path from 'node:path';
import { pathToFileURL } from 'node:url';

const asked = JSON.parse(process.argv[2]);
const NJS = path.resolve(import.meta.dirname, '../../nginx/njs');

// ---- Nginx' part: shared dictionaries, a set for each gateway

class Dictionary {
    constructor() { this.map = new Map(); }
    get(key) { return this.map.get(key); }
    has(key) { return this.map.has(key); }
    set(key, value) { this.map.set(key, value); }
    add(key, value) { return !this.map.has(key) && !!this.map.set(key, value); }
    delete(key) { return this.map.delete(key); }
    pop(key) { const value = this.map.get(key); this.map.delete(key); return value; }
    keys() { return [...this.map.keys()]; }
    incr(key, delta, init) {
        const value = (this.map.get(key) ?? init) + delta;
        this.map.set(key, value);
        return value;
    }
}

const memories = Array.from({ length: asked.gateways }, () => Object.create(null));
let at = 0;   // the gateway that runs now
const current = (zone) => memories[at][zone] || (memories[at][zone] = new Dictionary());
const METHODS = ['get', 'has', 'set', 'add', 'delete', 'pop', 'keys', 'incr'];

globalThis.ngx = {
    ERR: 0, WARN: 0, version: '', prefix: '', log: (_, text) => { throw new Error(text); },
    shared: new Proxy({}, { get: (_, zone) => Object.fromEntries(
        METHODS.map((method) => [method, (...args) => current(zone)[method](...args)])) }),
};
const load = (name) => import(pathToFileURL(`${NJS}/${name}.js`)).then((module) => module.default);
const [policies, fleet] = await Promise.all([load('policies'), load('fleet')]);

// ---- replicas: prompts at 10,000 tokens/s, 20 ms a step, a cache of 32k tokens, as those of `make bench`

const BLOCK = 64;          // characters: 16 tokens
const BLOCKS = 2048;
const PREFILL_MS = 0.1;    // a token
const STEP_MS = 20;
const SEQ_MS = 0.3;

class Replica {
    constructor(number) {
        Object.assign(this, { id: number % 255 + 1, name: `vllm-${number}`, weight: 1, canary: false, cache: new Map() });
        this.free = 0;
        this.running = 0;
    }

    // The blocks of a text, each known by all that comes before it too.
    static chain(text) {
        const blocks = [];
        let key = '';
        for (let i = 0; i + BLOCK <= text.length; i += BLOCK) {
            key = crypto.hash('md5', key + text.slice(i, i + BLOCK));
            blocks.push(key);
        }
        return blocks;
    }

    // How many blocks of the beginning are in the cache.
    known(blocks) {
        const miss = blocks.findIndex((block) => !this.cache.has(block));
        return miss < 0 ? blocks.length : miss;
    }

    keep(blocks) {
        for (const block of blocks) {
            this.cache.delete(block);
            this.cache.set(block, 1);
        }
        for (const old of this.cache.keys()) {
            if (this.cache.size <= BLOCKS) {
                break;
            }
            this.cache.delete(old);
        }
    }
}

// ---- clients

// Numbers in [0, 1) that depend on the seed only (mulberry32).
function numbers(seed) {
    let state = crypto.createHash('md5').update(String(seed)).digest().readUInt32LE();
    return () => {
        state = state + 0x6D2B79F5 | 0;
        let t = Math.imul(state ^ state >>> 15, 1 | state);
        t = t + Math.imul(t ^ t >>> 7, 61 | t) ^ t;
        return ((t ^ t >>> 14) >>> 0) / 2 ** 32;
    };
}

function words(random, tokens) {
    let text = '';
    while (text.length < tokens * 4) {
        text += (random() * 2 ** 52).toString(36) + ' ';
    }
    return text.slice(0, tokens * 4);
}

const user = (content) => ({ role: 'user', content });
const system = (content) => ({ role: 'system', content });

// What each client asks next, given the last answer; the first three of lab/bench/workloads.py's.
const WORKLOADS = {
    *chats(random) {
        for (;;) {
            const messages = [system(words(random, 300))];
            for (let turn = 0; turn < 6; turn++) {
                messages.push(user(words(random, 100)));
                messages.push({ role: 'assistant', content: yield messages });
            }
        }
    },
    *shared(random, common) {
        for (;;) {
            yield [system(common[Math.floor(random() * common.length)]), user(words(random, 60))];
        }
    },
};
WORKLOADS.documents = WORKLOADS.shared;
// Shared texts: how many for each four replicas, and their tokens.
const COMMON = { chats: [0, 0], shared: [12, 1500], documents: [48, 2000] };

// ---- the run

const replicas = Array.from({ length: asked.replicas }, (_, number) => new Replica(number));
const events = [];         // [time, what], the soonest first
const [count, tokens] = COMMON[asked.workload];
const texts = numbers(`${asked.seed} common`);
const common = Array.from({ length: count * asked.replicas / 4 }, () => words(texts, tokens));
let sent = 0;
let hits = 0;
let queries = 0;
const waits = [];

function later(time, what) {
    let low = 0;
    let high = events.length;
    while (low < high) {
        const middle = (low + high) >> 1;
        if (events[middle][0] > time) { low = middle + 1; } else { high = middle; }
    }
    events.splice(low, 0, [time, what]);
}

function ask(client, now) {
    const messages = client.asks.next(client.answer).value.slice();
    const gateway = Math.floor(client.random() * asked.gateways);
    at = gateway;
    const body = { model: 'sim', messages };
    const [replica, , work] = policies.prefix(replicas, { body, model: 'sim', session: '', several: asked.gateways > 1 && !asked.alone }, null);
    fleet.enter(replica.name, work);
    const measured = ++sent > asked.requests / 3;
    const blocks = Replica.chain(messages.map(({ role, content }) => `\n${role}\n${content}`).join(''));
    const known = replica.known(blocks);
    if (measured) {
        hits += known;
        queries += blocks.length;
    }
    replica.running++;
    replica.asked = (replica.asked || 0) + 1;
    const begun = Math.max(now, replica.free) + (blocks.length - known) * BLOCK / 4 * PREFILL_MS;
    replica.free = begun;
    if (measured) {
        waits.push(begun + STEP_MS - now);
    }
    later(begun, () => {
        at = gateway;
        fleet.begun(replica.name, work);
        replica.keep(blocks);
    });
    const answer = 20 + Math.floor(client.random() * 41);
    later(begun + answer * (STEP_MS + SEQ_MS * replica.running), (time) => {
        at = gateway;
        fleet.leave(replica.name, 0);
        replica.running--;
        client.answer = words(client.random, answer);
        replica.keep(Replica.chain([...messages, { role: 'assistant', content: client.answer }]
            .map(({ role, content }) => `\n${role}\n${content}`).join('')));
        if (sent < asked.requests) {
            ask(client, time + 1);
        }
    });
}

for (let number = 0; number < asked.clients; number++) {
    const random = numbers(`${asked.seed} ${number}`);
    const client = { random, asks: WORKLOADS[asked.workload](random, common), answer: undefined };
    later(random() * 1000, (time) => ask(client, time));
}
while (events.length) {
    const [time, what] = events.pop();
    what(time);
}
waits.sort((a, b) => a - b);
console.log(JSON.stringify({
    hits: hits / queries,
    p50: waits[waits.length >> 1],
    p90: waits[Math.floor(waits.length * 0.9)],
    busiest: Math.max(...replicas.map((replica) => replica.asked || 0)) / (sent / replicas.length),
}));
