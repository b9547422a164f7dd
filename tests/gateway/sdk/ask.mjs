// Asks a model with the real SDK of OpenAI or Anthropic, as sdks.py does in Python: `node ask.mjs '{"api": …, "url": …, …}'` prints
// what came of it: {"text", "error": the error's class, "status", "message", "request_id"}.

import Anthropic from '@anthropic-ai/sdk';
import OpenAI from 'openai';

const asked = JSON.parse(process.argv[2]);
const { model, prompt, stream } = asked;
const messages = [{ role: 'user', content: prompt }];
const options = { apiKey: 'none', maxRetries: asked.retries, timeout: 30000 };
const openai = () => new OpenAI({ baseURL: `${asked.url}/v1`, ...options });
const anthropic = () => new Anthropic({ baseURL: asked.url, ...options });

const APIS = {
    chat: {
        ask: () => openai().chat.completions.create({ model, messages, stream, max_tokens: 20 }),
        whole: (answer) => answer.choices[0].message.content,
        piece: (event) => event.choices[0]?.delta.content,
    },
    responses: {
        ask: () => openai().responses.create({ model, input: prompt, stream, max_output_tokens: 20 }),
        whole: (answer) => answer.output[0].content[0].text,
        piece: (event) => event.type === 'response.output_text.delta' && event.delta,
    },
    messages: {
        ask: () => anthropic().messages.create({ model, messages, stream, max_tokens: 20 }),
        whole: (answer) => answer.content[0].text,
        piece: (event) => event.type === 'content_block_delta' && event.delta.text,
    },
};

const said = { text: '', error: '', status: null, message: '', request_id: null };
try {
    const api = APIS[asked.api];
    const answer = await api.ask();
    if (stream) {
        for await (const event of answer) {
            said.text += api.piece(event) || '';
        }
    } else {
        said.text = api.whole(answer);
    }
} catch (e) {
    Object.assign(said, { error: e.constructor.name, status: e.status ?? null, message: e.message, request_id: e.requestID ?? null });
}
console.log(JSON.stringify(said));
