// A chat with a model through this gateway: how soon it began, how fast it came, from which replica, and why that one.
// Comes after status.js, and uses its functions.
'use strict';

const MOST_TOKENS = 1024;
const RETRY_MS = 2000;

const REASONS = {
  prefix: 'which knows the beginning of this chat',
  session: 'where this session was before',
  load: 'which had the least to do',
  turn: 'whose turn it was',
  retry: 'after another one failed',
  wake: 'which it woke',
};

// What was said so far, as the API takes it.
let chat = [];
// Ends the answer that comes now.
let stop = null;

async function listModels() {
  const reply = await fetch('/v1/models', {headers: credentials(), cache: 'no-store'}).catch(() => null);
  if (reply?.status === 401) {
    byId('play').hidden = true;
    return;
  }
  const models = reply?.ok ? (await reply.json()).data.map((model) => model.id) : [];
  if (!models.length) {
    setTimeout(listModels, RETRY_MS);
    return;
  }
  byId('model').replaceChildren(...models.map((name) => new Option(name)));
  byId('play').hidden = false;
}

// The events of a stream, as they come; each is what stands behind `data:`.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = '';
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    text += value;
    const whole = text.split(/\r?\n\r?\n/);
    text = whole.pop();
    for (const event of whole) {
      for (const line of event.split(/\r?\n/)) {
        if (line.startsWith('data:')) yield line.slice(5).trim();
      }
    }
  }
}

// One line about an answer. `times`: milliseconds of its beginning, first and last token.
function facts(reply, {begun, first, last}, usage) {
  const parts = [];
  if (first) parts.push(`first token after ${duration(first - begun)}`);
  if (usage && usage.completion_tokens > 1 && last > first) {
    parts.push(`${rate((usage.completion_tokens - 1) * 1000 / (last - first))} tokens/s`);
  }
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens || 0;
    parts.push(`${usage.prompt_tokens} tokens in (${cached} from the cache), ${usage.completion_tokens} out`);
  }
  const replica = reply.headers.get('X-Replica');
  const reason = REASONS[reply.headers.get('X-Route-Reason')];
  if (replica) parts.push(`by ${replica}${reason ? `, ${reason}` : ''}`);
  return parts.join(' · ');
}

// Asks for an answer to the chat and shows it in `turn` as it comes; gives its text.
async function answer(turn, signal) {
  const show = (what, text) => { turn.querySelector(what).textContent = text; };
  const times = {begun: performance.now(), first: 0, last: 0};
  const reply = await fetch('/v1/chat/completions', {
    method: 'POST',
    headers: {...credentials(), 'Content-Type': 'application/json'},
    body: JSON.stringify({
      model: byId('model').value, messages: chat, max_tokens: MOST_TOKENS, stream: true, stream_options: {include_usage: true},
    }),
    signal,
  });
  if (!reply.ok) {
    const said = await reply.json().catch(() => null);
    throw new Error(said?.error?.message || `The gateway answered ${reply.status}.`);
  }
  let text = '', thought = '', usage = null;
  try {
    for await (const event of events(reply.body)) {
      if (event === '[DONE]') break;
      const part = JSON.parse(event);
      if (part.error) throw new Error(part.error.message);
      usage = part.usage || usage;
      const {content, reasoning, reasoning_content: reasoned} = part.choices?.[0]?.delta || {};
      if (content || reasoning || reasoned) {
        times.last = performance.now();
        times.first ||= times.last;
        show('.answer', text += content || '');
        show('.thinking', thought += reasoning || reasoned || '');
        turn.scrollIntoView({block: 'nearest'});
      }
    }
  } finally {
    show('.facts', facts(reply, times, usage));
  }
  return text;
}

async function send() {
  const question = byId('prompt').value.trim();
  if (!question) return;
  const turn = byId('turn').content.firstElementChild.cloneNode(true);
  turn.querySelector('.question').textContent = question;
  byId('talk').append(turn);
  byId('prompt').value = '';
  byId('send').textContent = 'Stop';
  const before = chat;
  chat = [...chat, {role: 'user', content: question}];
  stop = new AbortController();
  try {
    chat = [...chat, {role: 'assistant', content: await answer(turn, stop.signal)}];
  } catch (why) {
    const line = turn.querySelector('.facts');
    const stopped = why.name === 'AbortError';
    turn.classList.toggle('failed', !stopped);
    line.textContent = [stopped ? 'Stopped.' : why.message, line.textContent].filter(Boolean).join(' · ');
    // The model goes on from what it said; what it never answered is not part of the chat. A new one may have begun.
    const said = turn.querySelector('.answer').textContent;
    if (turn.isConnected) chat = said ? [...chat, {role: 'assistant', content: said}] : before;
  } finally {
    stop = null;
    byId('send').textContent = 'Send';
  }
}

byId('ask').addEventListener('submit', (event) => {
  event.preventDefault();
  if (stop) stop.abort();
  else send();
});

// Enter sends, with Shift it begins a line.
byId('prompt').addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!stop) send();
  }
});

byId('anew').addEventListener('click', () => {
  stop?.abort();
  chat = [];
  byId('talk').replaceChildren();
});

document.addEventListener('signed-in', listModels);
listModels();
