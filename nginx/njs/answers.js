// Answers of the gateway's own: JSON, errors in OpenAI's shape.

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
    501: ['not_implemented', 'This is not supported.'],
    505: ['http_version', 'This version of HTTP is not spoken here.'],
};

// The body of an error, which names the request id. `param` is the field at fault, or null.
function error(r, status, code, message, param) {
    const type = status < 500 ? (status === 429 ? 'rate_limit_error' : 'invalid_request_error') : 'server_error';
    return JSON.stringify({
        error: { message: `${message} (request id ${r.variables.id})`, type, param: param || null, code },
    });
}

function send(r, status, code, message, param) {
    r.headersOut['Content-Type'] = 'application/json';
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
    r.return(status, page(r, status));
}

function notFound(r) {
    send(r, 404, 'not_found', `There is no ${r.method} ${r.uri} here.`);
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

export default { error, page, send, answer, notFound, method, json };
