// Meters so many chunks of a stream in the gateway's own njs as the query says; cost.py reads the worker's CPU time before and after.

import usage from './usage.js';

const CHUNK = Buffer.from('data: {"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1796019566,"model":"sim",'
    + '"choices":[{"index":0,"delta":{"content":" word"},"logprobs":null,"finish_reason":null,"token_ids":null}],'
    + '"usage":{"prompt_tokens":512,"total_tokens":600,"completion_tokens":88,"prompt_tokens_details":{"cached_tokens":496}}}\n\n');

function meter(r) {
    const request = { uri: '/v1/chat/completions', variables: {} };
    for (let i = Number(r.variables.args); i > 0; i--) {
        usage.events(request, CHUNK);
    }
    r.return(204);
}

export default { meter };
