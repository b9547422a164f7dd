// openai@7.59.0
// OpenAI's SDK for Node: a chat, streamed.
//
// It reads OPENAI_BASE_URL (http://localhost/v1) and OPENAI_API_KEY.

import OpenAI from 'openai';

const stream = await new OpenAI().chat.completions.create({
  model: process.env.MODEL,
  messages: [{ role: 'user', content: 'What is the capital of France?' }],
  max_tokens: 40,
  stream: true,
});
for await (const event of stream) {
  process.stdout.write(event.choices[0].delta.content ?? '');
}
console.log();
