// @anthropic-ai/sdk@1.14.0
// Anthropic's SDK for Node: messages, streamed.
//
// It reads ANTHROPIC_BASE_URL (http://localhost, without /v1) and ANTHROPIC_API_KEY.

import Anthropic from '@anthropic-ai/sdk';

const stream = new Anthropic().messages.stream({
  model: process.env.MODEL,
  messages: [{ role: 'user', content: 'What is the capital of France?' }],
  max_tokens: 40,
});
stream.on('text', (text) => process.stdout.write(text));
await stream.finalMessage();
console.log();
