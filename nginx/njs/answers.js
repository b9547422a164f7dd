// Answers of the gateway's own: JSON, errors in the shape of the API that was asked.

const OF_NGINX = {
    400: ['invalid_request', 'The request is not valid HTTP.'],
    403: ['forbidden', 'Forbidden.'],
    404: ['not_found', 'Not found.'],
    405: ['method_not_allowed', 'Method not allowed.'],
    408: ['request_timeout', 'The request body did not arrive in time.'],
    411: ['length_required', 'The request needs a length.'],
    413: ['request_too_large', 'The request body is larger than this gateway takes.'],
    414: ['uri_too_long', 'The address is too long.'],
    415: ['unsupported_media_type', 'This media type is not supported.'],
    431: ['headers_too_large', 'The request headers are too large.'],
    429: ['too_many_requests', 'This address has too many requests on their way. Try again when one is over.'],
    501: ['not_implemented', 'This is not supported.'],
    505: ['http_version', 'This version of HTTP is not spoken here.'],
};

// INVALID_ARGUMENT, UNAUTHENTICATED, PERMISSION_DENIED, UNIMPLEMENTED, RESOURCE_EXHAUSTED, UNAVAILABLE
const OF_GRPC = { 400: 3, 401: 16, 403: 7, 404: 12, 429: 8, 503: 14 };
const UNKNOWN = 2;

const ANTHROPIC = {
    401: 'authentication_error',
    403: 'permission_error',
    404: 'not_found_error',
    413: 'request_too_large',
    429: 'rate_limit_error',
};

// Whether this API was asked. What Nginx refused before it had read the whole head has come to /error, where the request's
// first line may still tell.
function asks(r, api) {
    const path = r.uri === '/error' ? (r.variables.request || '').replace(/^\S* (https?:\/\/[^/]*)?/i, '') : r.uri;
    return path.startsWith(api);
}

// Whether Triton was asked (triton.js): other paths below /v2 are of the engine, or of nobody.
function isTritons(r) {
    return /^\/v2(\/(models|health|repository|systemsharedmemory|cudasharedmemory|trace|logging)(\/|$)|\/?$)/.test(r.uri);
}

// The body of an error, which names the request id. `param` is the field at fault, or null.
function error(r, status, code, message, param) {
    const id = r.variables.id;
    // What a client sent by mistake is not shown again.
    const text = `${message} (request id ${id})`.replace(/sk-fleet-[\w-]+/g, 'sk-fleet-…');
    if (asks(r, '/v1/messages')) {
        const type = ANTHROPIC[status] || (status < 500 ? 'invalid_request_error' : 'api_error');
        return JSON.stringify({ type: 'error', error: { type, message: text }, request_id: id });
    }
    if (isTritons(r)) {
        return JSON.stringify({ error: text });
    }
    const type = code === 'insufficient_quota' ? code : status < 500 ? (status === 429 ? 'rate_limit_error' : 'invalid_request_error') : 'server_error';
    return JSON.stringify({ error: { message: text, type, param: param || null, code } });
}

// The last events of a stream whose replica was lost.
function lost(r) {
    const why = `The replica ${r.variables.replica} was lost while it answered.`;
    const body = error(r, 502, 'stream_lost', why);
    if (asks(r, '/v1/messages')) {
        return `event: error\ndata: ${body}\n\n`;
    }
    if (asks(r, '/v1/responses')) {
        // Codex ends at the first, OpenAI's own clients at the second.
        const said = JSON.parse(body).error;
        const response = {
            id: r.variables.id, object: 'response', status: 'failed', output: [],
            error: { code: 'server_error', message: said.message },
        };
        const failed = { type: 'response.failed', sequence_number: 0, response };
        const event = { type: 'error', sequence_number: 0, code: said.code, message: said.message, param: null, error: said };
        return `event: response.failed\ndata: ${JSON.stringify(failed)}\n\nevent: error\ndata: ${JSON.stringify(event)}\n\n`;
    }
    return `data: ${body}\n\n`;
}

function send(r, status, code, message, param) {
    r.headersOut['Content-Type'] = 'application/json';
    // stream.js tells this answer from Nginx' own page by it
    r.answered = true;
    if (/^application\/grpc/i.test(r.headersIn['Content-Type'] || '')) {
        // What a client of gRPC reads of an answer that never began: a header and no body, whose status by HTTP is 200.
        r.headersOut['Content-Type'] = 'application/grpc';
        r.headersOut['grpc-status'] = String(OF_GRPC[status] || UNKNOWN);
        r.headersOut['grpc-message'] = encodeURI(message);
        r.return(200, '');
        return;
    }
    r.return(status, error(r, status, code, message, param));
}

// The body of what Nginx itself refused.
function page(r, status) {
    const [code, message] = OF_NGINX[status] || ['internal_error', 'The gateway failed.'];
    return error(r, status, code, message);
}

// error_page
function answer(r) {
    const status = Number(r.variables.status);
    r.headersOut['Content-Type'] = 'application/json';
    if (status === 429) {
        r.headersOut['Retry-After'] = '1';
    }
    r.return(status, page(r, status));
}

function notFound(r) {
    send(r, 404, 'not_found', `There is no ${r.method} ${r.uri} here.`);
}

// error_page of /token, whose errors are OAuth2's
function noToken(r) {
    r.headersOut['Content-Type'] = 'application/json';
    r.headersOut['Retry-After'] = '5';
    r.return(503, JSON.stringify({
        error: 'temporarily_unavailable',
        error_description: `The token service does not answer. COMPOSE_PROFILES=tokens in .env starts it. (request id ${r.variables.id})`,
    }));
}

function method(r, allowed) {
    r.headersOut.Allow = allowed;
    send(r, 405, 'method_not_allowed', `${r.uri} takes ${allowed}, not ${r.method}.`);
}

// Answers 200 with a JSON value.
function json(r, value) {
    r.headersOut['Content-Type'] = 'application/json';
    r.headersOut['Cache-Control'] = 'no-store';
    r.return(200, JSON.stringify(value));
}

export default { error, lost, page, send, answer, notFound, noToken, method, json };
