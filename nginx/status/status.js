// The fleet as the gateway sees it, read from /status.json once a second.
'use strict';

const POLL_MS = 1000;
const HISTORY = 120;

// What each state means for the replica's share of the work.
const LEVELS = {
  ready: 'ok', asleep: 'unknown', loading: 'unknown', draining: 'warn', stopped: 'unknown', wedged: 'bad', unreachable: 'bad',
};

const REFUSALS = {
  full: 'as all replicas were full',
  none_ready: 'as no replica was ready',
  asleep: 'as the model did not wake in time',
  unknown_model: 'for an unknown model',
  closed: 'as there are no keys',
  failed: 'after two replicas failed',
  host: 'for a name that is not ours',
  origin: 'from a foreign page',
  media: 'for a body that is no JSON',
  connection: 'for a header of the connection',
  key: 'for want of a valid key',
  role: 'as the key was not an admin\'s',
  limit: 'over a limit',
  quota: 'as a quota was spent',
  url: 'for a key in the address',
};

const byId = (id) => document.getElementById(id);
const sum = (list, field) => list.reduce((total, item) => total + (item[field] || 0), 0);
const names = (list) => list.map((replica) => replica.name).join(list.length > 2 ? ', ' : ' and ');
const count = (n, one, many = `${one}s`) => `${n} ${n === 1 ? one : many}`;
const isNumber = (value) => typeof value === 'number' && Number.isFinite(value);

const percent = (share) => isNumber(share) ? `${Math.round(share * 100)} %` : '–';
const rate = (value) => isNumber(value) ? value.toFixed(value > 0 && value < 10 ? 1 : 0) : '–';

function duration(ms) {
  if (!isNumber(ms)) return '–';
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}

function uptime(seconds) {
  const minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60), days = Math.floor(hours / 24);
  if (days) return `${days} d ${hours % 24} h`;
  if (hours) return `${hours} h ${minutes % 60} min`;
  return minutes ? `${minutes} min` : `${Math.floor(seconds)} s`;
}

// Who does not take requests, and who takes them instead.
function outOfRoute(out, ready) {
  const who = Object.keys(LEVELS)
    .map((state) => ({state, members: out.filter((replica) => replica.state === state)}))
    .filter(({members}) => members.length)
    .map(({state, members}) => `${names(members)} ${members.length === 1 ? 'is' : 'are'} ${state}`)
    .join(', ');
  const rest = ready.length === 1 ? `${ready[0].name} carries all load` : `the other ${ready.length} carry the load`;
  return `${who}; ${rest}`;
}

const peersOf = (replica, replicas) =>
  replicas.filter((other) => other !== replica && other.models.some((model) => replica.models.includes(model)));

// A replica is slow when its first token takes far longer than its peers' and long enough to be felt. What an idle one
// took last time is history.
function slowest(ready) {
  const timed = ready.filter((replica) => isNumber(replica.ttft_ms)).sort((a, b) => b.ttft_ms - a.ttft_ms);
  for (const replica of timed) {
    const peers = peersOf(replica, timed);
    const usual = peers[Math.floor(peers.length / 2)]?.ttft_ms;
    const slow = replica.in_flight > 0 && replica.ttft_ms > 1000 && replica.ttft_ms > 3 * usual;
    if (slow) return {name: replica.name, ttft: replica.ttft_ms, usual};
  }
  return null;
}

/**
 * Why a request may be slow now: the gravest cause first.
 * @returns {{level: string, word: string, sentence: string}}
 */
function verdict(replicas, refusedLately) {
  const ready = replicas.filter((replica) => replica.state === 'ready');
  const asleep = replicas.filter((replica) => replica.state === 'asleep');
  // what the autoscaler has stopped, and what sleeps, is as it should be
  const out = replicas.filter((replica) => !['ready', 'asleep', 'stopped'].includes(replica.state));
  const queued = ready.filter((replica) => replica.waiting > 0);
  const waiting = sum(ready, 'waiting');
  const waits = `${count(waiting, 'request')} ${waiting === 1 ? 'waits' : 'wait'}`;

  if (!replicas.length) {
    return {level: 'bad', word: 'No fleet', sentence: 'The gateway knows no replica: add one in nginx/fleet/.'};
  }
  if (!ready.length && asleep.length) {
    const others = out.length ? `, and ${names(out)} ${out.length === 1 ? 'is' : 'are'} away` : '';
    const all = asleep.length > 1 ? 'sleep: the first request for a model wakes it' : 'sleeps: the first request wakes it';
    return {level: out.length ? 'warn' : 'ok', word: 'Asleep', sentence: `${names(asleep)} ${all}${others}.`};
  }
  if (!ready.length) {
    const loading = out.filter((replica) => replica.state === 'loading').length;
    const wait = loading ? `${loading} of ${replicas.length} ${loading === 1 ? 'is' : 'are'} loading` : 'none is loading';
    return {level: 'bad', word: 'Down', sentence: `No replica is ready, ${wait}: requests are refused until one is.`};
  }
  if (refusedLately > 0) {
    return {
      level: 'bad', word: 'Full',
      sentence: `All replicas are full: ${count(refusedLately, 'request')} refused in the last minute.`,
    };
  }
  const free = ready.filter((replica) => !replica.waiting && peersOf(replica, queued).length);
  const busy = queued.length > 0 && !free.length;
  if (out.length) {
    const more = waiting ? `, and ${waits}` : '';
    return {level: 'warn', word: busy ? 'Busy' : 'Reduced', sentence: `${outOfRoute(out, ready)}${more}.`};
  }
  if (busy) {
    const who = queued.length === ready.length && ready.length > 1 ? 'All replicas' : names(queued);
    return {level: 'warn', word: 'Busy', sentence: `${who} ${queued.length === 1 ? 'is' : 'are'} busy: ${waits}.`};
  }
  if (queued.length) {
    const room = `${names(free)} ${free.length === 1 ? 'has' : 'have'} room`;
    return {level: 'warn', word: 'Uneven', sentence: `${waits} at ${names(queued)}, while ${room}.`};
  }
  const full = ready.filter((replica) => replica.kv_usage > 0.95);
  if (full.length) {
    return {level: 'warn', word: 'Tight', sentence: `The KV cache of ${names(full)} is nearly full: requests may be put back.`};
  }
  const slow = slowest(ready);
  if (slow) {
    return {
      level: 'warn', word: 'Slow replica',
      sentence: `${slow.name} is slow: first token after ${duration(slow.ttft)}, ${duration(slow.usual)} elsewhere.`,
    };
  }
  const running = sum(ready, 'in_flight');
  const load = running ? `${count(running, 'request')} in work, none waits` : 'nothing to do';
  const stopped = replicas.filter((replica) => replica.state === 'stopped').length;
  const resting = (asleep.length ? `, ${asleep.length} asleep` : '') + (stopped ? `, ${stopped} stopped` : '');
  return {level: 'ok', word: 'All well', sentence: `${count(ready.length, 'replica')} ready${resting}, ${load}.`};
}

// A small chart of one value's history: the floor is 0, the top the highest value shown (1 for shares).
function draw(box, values, top) {
  const highest = Math.max(top, ...values.filter(isNumber)) || 1;
  const strokes = [], areas = [];
  let run = [];
  const close = () => {
    if (run.length > 1) {
      strokes.push(`M${run.join('L')}`);
      areas.push(`M${run[0].split(' ')[0]} 30L${run.join('L')}L${run.at(-1).split(' ')[0]} 30Z`);
    }
    run = [];
  };
  values.forEach((value, i) => {
    if (isNumber(value)) run.push(`${HISTORY - values.length + i} ${(30 - 28 * value / highest).toFixed(2)}`);
    else close();
  });
  close();
  box.querySelector('.stroke').setAttribute('d', strokes.join(''));
  box.querySelector('.area').setAttribute('d', areas.join(''));
}

function emptyChart(box) {
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  svg.setAttribute('viewBox', `0 0 ${HISTORY - 1} 31`);
  svg.setAttribute('preserveAspectRatio', 'none');
  svg.setAttribute('aria-hidden', 'true');
  for (const name of ['area', 'floor', 'stroke']) {
    const path = document.createElementNS(svg.namespaceURI, 'path');
    path.setAttribute('class', name);
    if (name === 'floor') path.setAttribute('d', `M0 30H${HISTORY - 1}`);
    svg.append(path);
  }
  box.append(svg);
}

// One card a replica, kept as long as the gateway knows the replica.
const cards = new Map();

function card(name) {
  if (!cards.has(name)) {
    const element = byId('replica').content.firstElementChild.cloneNode(true);
    element.querySelectorAll('.chart').forEach(emptyChart);
    cards.set(name, {element, history: {prefix_hit_rate: [], tokens_per_s: [], ttft_ms: []}});
  }
  return cards.get(name);
}

function show(replica) {
  const {element, history} = card(replica.name);
  const put = (field, text) => { element.querySelector(`[data-is="${field}"]`).textContent = text; };
  element.dataset.level = LEVELS[replica.state] || 'unknown';
  element.dataset.replica = replica.name;
  put('name', replica.name);
  put('host', replica.host ? `on ${replica.host}` : '');
  put('state', replica.state);
  put('reason', replica.state === 'ready' ? '' : replica.reason || '');
  put('models', replica.models.join(', ') || 'no model yet');
  put('weight', replica.weight);
  for (const field of ['in_flight', 'running', 'waiting']) put(field, replica[field] ?? '–');
  element.querySelector('[data-is="waiting"]').classList.toggle('high', replica.waiting > 0);

  put('kv', percent(replica.kv_usage));
  const bar = element.querySelector('.bar');
  const used = Math.round((replica.kv_usage || 0) * 100);
  bar.setAttribute('aria-valuenow', used);
  bar.classList.toggle('high', used > 95);
  bar.firstElementChild.style.width = `${used}%`;

  put('hits', percent(replica.prefix_hit_rate));
  put('tokens_per_s', rate(replica.tokens_per_s));
  put('ttft', duration(replica.ttft_ms));
  for (const [field, values] of Object.entries(history)) {
    values.push(replica[field]);
    if (values.length > HISTORY) values.shift();
    draw(element.querySelector(`[data-chart="${field}"]`), values, field === 'prefix_hit_rate' ? 1 : 0);
  }
  return element;
}

// Requests refused for want of room in the last minute, from the gateway's counters.
const fullCounts = [];

function refusedInLastMinute(refused) {
  fullCounts.push(refused.full || 0);
  if (fullCounts.length > 60) fullCounts.shift();
  return Math.max(0, fullCounts.at(-1) - fullCounts[0]);
}

// How each model stands against its objectives. Counts since the replicas started come in; what they gained while this page was
// open, over the last two minutes at most, is shown. Of failed requests the gateway knows no model.
const counted = new Map();
const TIMELY = 0.95;   // what an objective's 95th percentile means
// Rounded down: what misses its aim must not read as if it met it. The parts of a figure stay on one line.
const exact = (share) => `${Number((Math.floor(share * 1e4 + 1e-6) / 100).toFixed(2))}\u00a0%`;

function gained(key, counts) {
  let seen = [...(counted.get(key) || []), counts].slice(-HISTORY);
  // A replica that started again counts from 0.
  if (counts.some((count, i) => count < seen.at(-2)?.[i])) seen = [counts];
  counted.set(key, seen);
  return counts.map((count, i) => count - seen[0][i]);
}

function cell(head, share, of, aim, text) {
  const element = document.createElement('td');
  element.dataset.head = head;
  element.dataset.level = !of ? 'unknown' : share >= aim ? 'ok' : 'bad';
  element.textContent = `${of ? exact(share) : '–'} ${text}, aim\u00a0${exact(aim)}`;
  return element;
}

function showObjectives(objectives, refused) {
  const [lost] = gained('', [(refused.failed || 0) + (refused.none_ready || 0)]);
  const rows = objectives.map(({model, objective, ttft, itl}) => {
    const [begun, first, timely, next] = gained(model, [...ttft, ...itl]);
    const row = document.createElement('tr');
    const name = document.createElement('th');
    name.scope = 'row';
    name.textContent = model;
    row.append(
      name,
      cell('First token', begun / first, first, TIMELY, `within ${duration(objective.ttft_p95_seconds * 1000)}`),
      cell('Next tokens', timely / next, next, TIMELY, `within ${duration(objective.itl_p95_seconds * 1000)}`),
      cell('Answered', first / (first + lost), first + lost, objective.availability, `of ${count(Math.round(first + lost), 'request')}`),
    );
    return row;
  });
  byId('objectives').hidden = !rows.length;
  byId('objectives').querySelector('tbody').replaceChildren(...rows);
}

function announce({level, word, sentence}) {
  byId('verdict').dataset.level = level;
  if (byId('word').textContent !== word) byId('word').textContent = word;
  byId('sentence').textContent = sentence;
  document.title = `${word} – Fleet status`;
}

function render(status) {
  const {gateway, replicas} = status;
  announce(verdict(replicas, refusedInLastMinute(gateway.refused)));

  byId('gateway').textContent =
    `Gateway ${gateway.version}, policy ${gateway.policy}, up ${uptime(gateway.uptime_s)}`;
  byId('totals').hidden = false;
  const running = replicas.filter((replica) => replica.state !== 'stopped');
  byId('ready').textContent = `${running.filter((replica) => replica.state === 'ready').length} of ${running.length}`;
  byId('in-flight').textContent = sum(replicas, 'in_flight');
  byId('waiting').textContent = sum(replicas, 'waiting');
  byId('tokens').textContent = rate(sum(replicas, 'tokens_per_s'));

  const shown = replicas.map(show);
  const box = byId('replicas');
  if (shown.length !== box.children.length || shown.some((element, i) => element !== box.children[i])) {
    box.replaceChildren(...shown);
  }
  const there = new Set(replicas.map((replica) => replica.name));
  for (const name of cards.keys()) if (!there.has(name)) cards.delete(name);

  byId('differences').textContent = (status.differences || []).join(' ');
  showObjectives(status.objectives || [], gateway.refused);

  const causes = Object.entries(gateway.refused).filter(([, n]) => n > 0);
  byId('refused').textContent = causes.length
    ? `Refused since the gateway started: ${causes.map(([cause, n]) => `${n} ${REFUSALS[cause] || cause}`).join(', ')}.`
    : 'No request refused since the gateway started.';
}

const KEY = 'fleet-key';

function signIn(sentence) {
  byId('sign-in').hidden = false;
  announce({level: 'unknown', word: 'Sign in', sentence});
}

// What a request says of who asks.
function credentials() {
  const key = sessionStorage.getItem(KEY);
  return key ? {Authorization: `Bearer ${key}`} : {};
}

byId('sign-in').addEventListener('submit', (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId('key').value.trim());
  byId('key').value = '';
  document.dispatchEvent(new Event('signed-in'));
  poll();
});

// The status; null where a key is asked for.
async function ask() {
  const key = sessionStorage.getItem(KEY);
  const reply = await fetch('/status.json', {headers: credentials(), cache: 'no-store', signal: AbortSignal.timeout(4000)});
  if (reply.status === 401 || reply.status === 403) {
    const user = reply.status === 403;
    if (!user) sessionStorage.removeItem(KEY);
    signIn(!key ? 'This gateway asks for a key.' : user ? 'Your key may use models. The status is for admins.' : 'That key is not taken here.');
    return null;
  }
  byId('sign-in').hidden = true;
  if (!reply.ok) throw new Error(`status ${reply.status}`);
  return reply.json();
}

let lastAnswer = Date.now();

async function poll() {
  const status = await ask().catch(() => undefined);
  document.body.classList.toggle('stale', !status);
  // Until somebody has signed in there is nothing to ask for.
  if (status === null) return;
  setTimeout(poll, POLL_MS);
  if (status) {
    lastAnswer = Date.now();
    render(status);
  } else {
    const seconds = Math.round((Date.now() - lastAnswer) / 1000);
    announce({level: 'bad', word: 'No gateway', sentence: `The gateway has not answered this page for ${seconds} s.`});
  }
}

poll();
