// Who comes as far as to be asked for a key. While there are none: programs, and of pages in browsers only those that a setting
// names. A page cannot hide where it comes from: a browser sends the page's origin with every POST, and the name that it took
// for an address.

import answers from './answers.js';
import keys from './keys.js';
import metrics from './metrics.js';
import settings from './settings.js';

// Another's DNS cannot make these mean this host; `gateway` is the name that the other containers use.
const LOCAL = /^(localhost|gateway|host\.docker\.internal|[0-9.]+|\[[0-9a-f:.]+\])?$/;
// What a client may say of its connection. Other headers that it names there would have to stay here, and would not.
const CONNECTION = new Set(['', 'close', 'keep-alive', 'upgrade', 'http2-settings', 'te', 'trailer', 'proxy-connection']);
const BODY = /^(application\/json|application\/grpc|multipart\/form-data)\s*(;|$)/i;
// A form that a page may send without asking first. It holds a password, so whoever sends it knows that already.
const SIGN_IN = '/token';

// $cors: the origin that may read the answer, or ''.
function cors(r) {
    const origin = r.headersIn.Origin || '';
    return settings.origins.includes(origin.toLowerCase()) ? origin : '';
}

// A header that the client wants to go no further than here, though Nginx would pass it on; undefined if there is none.
function kept(r) {
    return (r.headersIn.Connection || '').split(',').map((name) => name.trim()).find((name) => !CONNECTION.has(name.toLowerCase()));
}

const KEY_IN_URL = /sk-fleet-|[?&](api[_-]?key|x-api-key|key|(access[_-]?)?token|authorization)=|[?&=]eyJ/i;

// $unfolded: 'url' if an address that is spelt with % holds a key. It may be spelt so more than once.
function unfolded(r) {
    let text = `${r.variables.request_uri} ${r.headersIn.Referer || ''} ${r.variables.host}`;
    for (let i = 0; i < 4; i++) {
        if (KEY_IN_URL.test(text)) {
            return 'url';
        }
        const before = text;
        // What is no ASCII stays as it is spelt.
        text = decodeURIComponent(text.replace(/%(?![0-7][0-9a-f])/gi, '%25'));
        if (text === before) {
            break;
        }
    }
    return '';
}

// Why the request is not let in (url, host, origin, media, connection), '' if it is; a browser's question before it sends (preflight) is
// answered in the same place. A page has no key, so where keys are asked for its address and its origin do not matter; but a
// browser is told that it may ask only for an origin that is listed.
function reason(r) {
    if (r.variables.key_in_url) {
        return 'url';
    }
    const host = r.variables.host;
    const keyed = keys.required();
    if (!keyed && !LOCAL.test(host) && !settings.hosts.includes(host)) {
        return 'host';
    }
    const origin = r.headersIn.Origin;
    if (origin !== undefined) {
        if (cors(r)) {
            if (r.method === 'OPTIONS') {
                return 'preflight';
            }
        } else if (keyed && r.method !== 'OPTIONS') {
            // The key decides.
        } else if (!/^https?:\/\//.test(origin) || origin.slice(origin.indexOf('//') + 2) !== (r.headersIn.Host || '').toLowerCase()) {
            return 'origin';
        }
    }
    const type = r.headersIn['Content-Type'];
    if (r.method === 'POST' && r.uri !== SIGN_IN && type !== undefined && !BODY.test(type)) {
        return 'media';
    }
    return kept(r) === undefined ? '' : 'connection';
}

// $refused: the reason, asked once; a redirect to an error's page is let in.
function refusal(r) {
    return r.internal ? '' : reason(r);
}

function answer(r) {
    const why = reason(r);
    if (why !== 'preflight') {
        metrics.refused(why);
    }
    switch (why) {
    case 'url':
        answers.send(r, 400, 'key_in_url', 'The address of this request, or of the page that it came from, holds a key, which may '
            + "now stand in logs: rotate it. Send keys in the header 'Authorization: Bearer KEY'.");
        break;
    case 'host':
        answers.send(r, 421, 'unknown_host', `This gateway does not answer to the name ${r.variables.host}: `
            + 'use an IP address or localhost, or list the name in GATEWAY_HOSTS.');
        break;
    case 'origin':
        answers.send(r, 403, 'foreign_origin', `Pages of ${r.headersIn.Origin.slice(0, 200)} may not use this gateway: `
            + 'list the origin in CORS_ORIGINS if they should.');
        break;
    case 'media':
        answers.send(r, 415, 'unsupported_media_type', `A body of type ${r.headersIn['Content-Type'].slice(0, 200)} is not `
            + "read here: send JSON with the header 'Content-Type: application/json'.");
        break;
    case 'connection':
        answers.send(r, 400, 'connection_header', `The header Connection names ${kept(r).slice(0, 200)}, which would have to go no `
            + 'further than this gateway: leave both out.');
        break;
    default:
        r.headersOut['Access-Control-Allow-Methods'] = 'GET, POST';
        r.headersOut['Access-Control-Allow-Headers'] = r.headersIn['Access-Control-Request-Headers'] || '';
        r.headersOut['Access-Control-Max-Age'] = '600';
        r.return(204);
    }
}

// A request that came by plain HTTP where clients should use HTTPS. One with a body is not sent on: it has shown its key
// once already, and its sender should learn of it.
function redirect(r) {
    const port = settings.httpsPort === '443' ? '' : `:${settings.httpsPort}`;
    const url = `https://${r.variables.host}${port}`;
    if (r.method === 'GET' || r.method === 'HEAD') {
        r.return(308, url + r.variables.request_uri);
    } else {
        answers.send(r, 403, 'https_required', `Use ${url}: what came by plain HTTP could be read on its way. `
            + 'If a key was in it, rotate it.');
    }
}

export default { cors, refusal, unfolded, answer, redirect };
