// Who calls: the key or the token that a request brings.
//
// `refresh` reads secrets/keys.json and secrets/tokens.json when they change, and lays each key's holder under its hash into
// the shared dictionary `keys`, for all workers. A file that cannot be read, is gone, or holds something unknown, changes nothing.
// The zone `keyed` outlasts a restart and has a mark for each file that was ever there: without it the gateway stays closed.

import fs from 'fs';
import crypto from 'crypto';
import answers from './answers.js';
import fleet from './fleet.js';
import metrics from './metrics.js';
import settings from './settings.js';
import tokens from './tokens.js';

const shared = ngx.shared.keys;
const marks = ngx.shared.keyed;

const KEY = /^sk-fleet-[A-Za-z0-9_-]{43}$/;
const KEY_LENGTH = 52;
const TOKEN = /^eyJ[\w-]*\.[\w-]+\.[\w-]*$/;
const TOKEN_BYTES = 8192;
// It stands in logs and metrics, so it must be no key and no token.
const END_USER = /^(?!.*sk-fleet-|eyJ)[!-~]{1,128}$/;

const FILES = ['keys.json', 'tokens.json'];
const LARGEST = 1 << 22;   // bytes of a file
const MOST = 10000;        // keys
const LATER = 300000;      // ms between two looks at an issuer's keys …
const SOON = 15000;        // … if a token came with a key that is not known
const JWKS = 1 << 16;      // bytes of them
const HASHES = 8;          // of one key
const MODELS = 256;        // of one key
const PRIORITY = 1000;
const NAME = /^[a-z0-9][a-z0-9._-]{0,63}$/;
const HASH = /^[0-9a-f]{64}$/;
const ROLES = ['user', 'admin'];
const LIMITS = ['requests_per_minute', 'tokens_per_minute', 'tokens_per_day', 'tokens_per_month', 'parallel_requests',
    'prompt_tokens', 'body_bytes', 'max_tokens', 'n'];
const FIELDS = {
    file: ['version', 'keys', 'roles', 'end_users'],
    key: ['id', 'name', 'hashes', 'role', 'models', 'limits', 'priority', 'end_users', 'expires', 'created', 'note'],
    hash: ['sha256', 'until'],
    role: ['limits'],
};

// Whoever calls a gateway that asks for no key.
const ANYONE = { name: '', role: 'admin', models: null, limits: {}, priority: null, end_users: false };

// ---- the files

function must(condition, what) {
    if (!condition) {
        throw Error(what);
    }
}

// A JSON object that has no other fields than these.
function object(value, fields, where) {
    must(value && typeof value === 'object' && !Array.isArray(value), `${where} is no object`);
    const unknown = Object.keys(value).filter((name) => !fields.includes(name));
    must(!unknown.length, `${where} has an unknown field: ${unknown.join(', ').slice(0, 100)}`);
    return value;
}

function number(value, least, where) {
    must(Number.isSafeInteger(value) && value >= least, `${where} is no whole number of ${least} or more`);
    return value;
}

function limitsOf(value, where) {
    const limits = object(value || {}, LIMITS, where);
    Object.keys(limits).forEach((name) => number(limits[name], 0, `${where}.${name}`));
    return limits;
}

// What the text of keys.json says: {holders: by hash, roles: each one's limits, endUsers: the limits of each}.
function parse(text) {
    const file = object(JSON.parse(text), FIELDS.file, 'the file');
    must(file.version === 1, `its version is ${String(file.version).slice(0, 20)}, and this gateway reads 1`);
    must(Array.isArray(file.keys) && file.keys.length <= MOST, `"keys" is no list of at most ${MOST}`);
    const roles = {};
    const given = object(file.roles || {}, ROLES, '"roles"');
    ROLES.forEach((role) => {
        roles[role] = limitsOf(object(given[role] || {}, FIELDS.role, `role ${role}`).limits, `role ${role}`);
    });
    const endUsers = limitsOf(object(file.end_users || {}, FIELDS.role, '"end_users"').limits, '"end_users"');
    const holders = Object.create(null);
    const names = new Set();
    file.keys.forEach((key, i) => {
        object(key, FIELDS.key, `key ${i + 1}`);
        const { name } = key;
        must(typeof name === 'string' && NAME.test(name) && !names.has(name), `the name of key ${i + 1} is wrong or there twice`);
        names.add(name);
        const where = `key ${name}`;
        must(ROLES.includes(key.role), `${where}: its role is none of ${ROLES.join(', ')}`);
        must(key.models === null || Array.isArray(key.models) && key.models.length <= MODELS && key.models.every((model) => typeof model === 'string'),
            `${where}: "models" is neither null nor a list of at most ${MODELS} names`);
        must(typeof key.end_users === 'boolean', `${where}: "end_users" is neither true nor false`);
        must(Number.isSafeInteger(key.priority) && Math.abs(key.priority) <= PRIORITY,
            `${where}: "priority" is no whole number from -${PRIORITY} to ${PRIORITY}`);
        must(Array.isArray(key.hashes) && key.hashes.length && key.hashes.length <= HASHES,
            `${where}: "hashes" is no list of 1 to ${HASHES}`);
        // The role's is what a key has that says nothing else.
        const limits = Object.assign({}, roles[key.role], limitsOf(key.limits, where));
        const expires = key.expires === null ? null : number(key.expires, 0, `${where}: "expires"`);
        key.hashes.forEach((hash) => {
            const { sha256, until } = object(hash, FIELDS.hash, `${where}: a hash`);
            must(HASH.test(sha256) && !holders[sha256], `${where}: a hash is wrong or there twice`);
            holders[sha256] = {
                name, role: key.role, models: key.models, limits, priority: key.priority, end_users: key.end_users, expires,
                until: until === null ? null : number(until, 0, `${where}: "until"`),
            };
        });
    });
    return { holders, roles, endUsers };
}

// What tells whether a file was changed; '' if there is none.
function stamp(name) {
    try {
        const { ino, size, mtimeMs, ctimeMs } = fs.statSync(settings.secrets + name);
        return [ino, size, mtimeMs, ctimeMs].join();
    } catch (e) {
        return e.code === 'ENOENT' || e.code === 'ENOTDIR' ? '' : String(e.message);
    }
}

function textOf(name) {
    const text = fs.readFileSync(settings.secrets + name, 'utf8');
    must(text.length <= LARGEST, `it is larger than ${LARGEST} bytes`);
    return text;
}

// Lays down what keys.json says, if it is there, and takes away what it no longer does.
function takeKeys(there) {
    const { holders, roles, endUsers } = there
        ? parse(textOf('keys.json')) : { holders: {}, roles: { user: {}, admin: {} }, endUsers: {} };
    for (const entry of shared.keys(fleet.ALL)) {
        if (entry.startsWith('key:') && !holders[entry.slice(4)]) {
            shared.delete(entry);
        }
    }
    fleet.put('keys', 'roles', JSON.stringify(roles));
    fleet.put('keys', 'end_users', JSON.stringify(endUsers));
    for (const hash of Object.keys(holders)) {
        fleet.put('keys', `key:${hash}`, JSON.stringify(holders[hash]));
    }
    return Object.keys(holders).length;
}

function takeTokens(there) {
    const issuers = there ? tokens.parse(textOf('tokens.json')) : [];
    fleet.put('keys', 'issuers', JSON.stringify(issuers));
    return issuers.length;
}

const TAKE = { 'keys.json': takeKeys, 'tokens.json': takeTokens };

// Reads what has changed. A file that is wrong is read again each time, and each time the log says so.
function refresh() {
    if (settings.auth === 'off') {
        fleet.put('keys', 'state', 'open');
        FILES.filter((name) => marks.has(name)).forEach((name) => marks.delete(name));
        return;
    }
    for (const name of FILES) {
        const now = stamp(name);
        const seen = shared.get(`seen:${name}`);
        if (now && !marks.has(name)) {
            marks.set(name, 1);
        } else if (!now && marks.has(name)) {
            metrics.broken(name);
            ngx.log(ngx.ERR, `secrets/${name} is gone: what was in force stays so, and nothing is opened; put it back`);
            if (seen) {
                continue;
            }
        }
        if (seen === now && !shared.has(`wrong:${name}`)) {
            continue;
        }
        try {
            fleet.put('keys', `count:${name}`, String(TAKE[name](now !== '')));
            fleet.put('keys', `seen:${name}`, now);
            shared.delete(`wrong:${name}`);
        } catch (e) {
            fleet.put('keys', `wrong:${name}`, '1');
            metrics.broken(name);
            // JSON's own complaint may show a piece of the file.
            const why = e instanceof SyntaxError ? 'it is not JSON' : e.message;
            ngx.log(ngx.ERR, `secrets/${name} is not taken: ${why}; what was in force stays so`);
        }
    }
    fleet.put('keys', 'state', state());
}

// Gets the keys of outside issuers from their addresses: every five minutes, and sooner for a token whose key is not known yet.
// All at once: Nginx ends a turn that still runs when the next one begins, and one address must not use up another's time.
async function fetchKeys() {
    const now = fleet.clock();
    const due = Array.from(new Set(issuers().map(({ jwks_uri: uri }) => uri))).filter((uri) => {
        const last = uri && shared.get(`asked:${uri}`);
        return uri && (last === undefined || now - Number(last) >= (shared.has(`want:${uri}`) ? SOON : LATER));
    });
    await Promise.all(due.map(fetchFrom));
}

// An address that fails keeps what it gave before.
async function fetchFrom(uri) {
    fleet.put('keys', `asked:${uri}`, String(fleet.clock()));
    shared.delete(`want:${uri}`);
    try {
        const answer = await ngx.fetch(uri, { max_response_body_size: JWKS });
        must(answer.status === 200, `it answers ${answer.status}`);
        fleet.put('keys', `jwks:${uri}`, JSON.stringify(tokens.keySet(await answer.text())));
    } catch (e) {
        metrics.broken('jwks');
        ngx.log(ngx.ERR, `the keys at ${uri} are not taken: ${e instanceof SyntaxError ? 'they are not JSON' : e.message}`);
    }
}

// The issuers in force, with the keys that came from their addresses.
function issuers() {
    const found = JSON.parse(shared.get('issuers') || '[]');
    for (const issuer of found) {
        if (issuer.jwks_uri) {
            issuer.keys = issuer.keys.concat(JSON.parse(shared.get(`jwks:${issuer.jwks_uri}`) || '[]'));
        }
    }
    return found;
}

// Whether a key is asked for: `open` (no), `keys` (yes), `none` (yes, but there is none), `broken` and `gone` (nobody can
// be let in).
function state() {
    const count = FILES.map((name) => shared.get(`count:${name}`));
    if (FILES.some((name, i) => shared.has(`wrong:${name}`) && count[i] === undefined)) {
        return 'broken';
    }
    const there = FILES.some((name) => shared.get(`seen:${name}`) || shared.has(`wrong:${name}`));
    if (!there && FILES.some((name) => marks.has(name))) {
        return 'gone';
    }
    if (!there) {
        return settings.auth === 'loopback' ? 'open' : 'none';
    }
    return 'keys';
}

function asked() {
    const now = shared.get('state');
    if (now === undefined) {
        refresh();
        return shared.get('state') || 'broken';
    }
    return now;
}

// Whether callers need a key.
function required() {
    return asked() !== 'open';
}

// ---- one request

function refusal(status, code, message) {
    return { refused: { status, code, message } };
}

// The key or token of a request, or why there is none.
function presented(r) {
    const { Authorization: authorization, 'x-api-key': other } = r.headersIn;
    if (authorization === undefined) {
        return other === undefined
            ? refusal(401, 'missing_api_key', "No key: send the header 'Authorization: Bearer KEY', or 'x-api-key: KEY'.")
            : other;
    }
    // What is as long as a key of this gateway's is looked at once, in `holderOf`.
    let key;
    if (authorization.length === 7 + KEY_LENGTH && authorization.slice(0, 7) === 'Bearer ') {
        key = authorization.slice(7);
    } else {
        [, key] = /^Bearer +([!-~]+) *$/i.exec(authorization) || [];
    }
    if (key === undefined) {
        return refusal(401, 'invalid_api_key', "The header Authorization is not of the form 'Bearer KEY'.");
    }
    if (other !== undefined && other !== key) {
        return refusal(401, 'invalid_api_key', 'The headers Authorization and x-api-key bring two different keys: send one.');
    }
    return key;
}

const UNKNOWN = refusal(401, 'invalid_api_key', 'This key is not known here.');
const EXPIRED = refusal(401, 'expired_api_key', 'This key has expired.');

const sha256 = crypto.createHash('sha256');          // to copy it costs half as much as to make one
let latest = { name: '', text: '', holder: null };   // the holder that came last

// Who holds this key: {name, role, models, limits, priority, end_users, until}, or {refused}. A promise of it for a token.
function holderOf(key) {
    if (KEY.test(key)) {
        const name = `key:${sha256.copy().update(key).digest('hex')}`;
        const text = shared.get(name);
        if (text === undefined) {
            return UNKNOWN;
        }
        if (latest.name !== name || latest.text !== text) {
            latest = { name, text, holder: JSON.parse(text) };
        }
        const { holder } = latest;
        const now = Date.now() / 1000;
        return holder.until !== null && now >= holder.until || holder.expires !== null && now >= holder.expires ? EXPIRED : holder;
    }
    return key.length <= TOKEN_BYTES && TOKEN.test(key) ? bearer(key) : UNKNOWN;
}

// The holder of a JWT.
async function bearer(token) {
    const found = await tokens.verify(token, issuers(), Date.now() / 1000);
    if (found.unknown) {
        fleet.put('keys', `want:${found.unknown}`, '1');
    }
    if (found.expired) {
        return refusal(401, 'expired_api_key', 'This token has expired.');
    }
    if (!ROLES.includes(found.role)) {
        return refusal(401, 'invalid_api_key', 'This token is not taken here.');
    }
    const { [found.role]: limits } = JSON.parse(shared.get('roles') || '{}');
    return { name: found.name, role: found.role, models: null, limits: limits || {}, priority: 0, end_users: false, token: true, until: found.until };
}

// Who calls: a holder, or one with `refused`: {status, code, message}; a promise of it for a token. The log and the metrics get
// the name.
function caller(r) {
    switch (asked()) {
    case 'open':
        return ANYONE;
    case 'none':
        return refusal(401, 'no_keys', settings.closed);
    case 'broken':
        return refusal(503, 'keys_unreadable', 'The gateway cannot read its keys, and lets nobody in until it can.');
    case 'gone':
        return refusal(503, 'keys_gone', 'This gateway had keys, and their file is gone: put secrets/gateway/keys.json back, make a '
            + 'key with `make key`, or set GATEWAY_AUTH=off to let everyone in.');
    }
    const key = presented(r);
    if (key.refused) {
        return key;
    }
    const holder = holderOf(key);
    return holder.then ? holder.then((found) => named(r, found)) : named(r, holder);
}

function named(r, holder) {
    if (!holder.refused) {
        r.variables.key = holder.name;
        if (holder.end_users) {
            const user = r.headersIn['X-End-User'];
            if (user !== undefined) {
                if (!END_USER.test(user)) {
                    return refusal(400, 'bad_end_user', 'X-End-User is not 1 to 128 printable characters of ASCII without a space.');
                }
                r.variables.end_user = user;
            }
        }
    }
    return holder;
}

// Whether this holder may use a model of this name.
function may(holder, model) {
    return holder.models === null || holder.models.includes(model);
}

// Answers a caller who is not let in.
function refuse(r, { status, code, message }) {
    metrics.refused(status === 403 ? 'role' : status === 503 ? 'closed' : code === 'no_keys' ? 'closed' : 'key');
    if (status === 401) {
        r.headersOut['WWW-Authenticate'] = 'Bearer';
    } else if (status === 503) {
        r.headersOut['Retry-After'] = '5';
    }
    answers.send(r, status, code, message);
}

// The caller, or null where it is not let in and has its answer.
async function admitted(r) {
    const holder = await caller(r);
    if (holder.refused) {
        refuse(r, holder.refused);
        return null;
    }
    return holder;
}

// js_access of what only admins may: `handle` answers them. Where no keys are asked for it is not there, but for `open`.
async function admins(r, handle, open) {
    if (!required() && !open) {
        answers.notFound(r);
        return;
    }
    const holder = await admitted(r);
    if (holder && holder.role !== 'admin') {
        refuse(r, { status: 403, code: 'forbidden', message: `${r.uri} is for keys of the role admin.` });
    } else if (holder) {
        await handle(r);
    }
}

export default { parse, refresh, fetchKeys, required, holderOf, caller, admitted, may, refuse, admins };
