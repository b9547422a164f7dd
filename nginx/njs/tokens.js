// JSON Web Tokens: whose they are, and whether they are what they say (RFC 7515, 7518, 7519, 8037).
//
// The algorithm is pinned: an issuer lists those that it uses, and each goes with one kind of key only. So a token can choose
// neither `none` nor to be checked with a public key as if that were a secret.

import hashes from 'crypto';
import ed25519 from './ed25519.js';

const ALGORITHMS = {
    HS256: { kty: 'oct' },
    RS256: { kty: 'RSA', name: 'RSASSA-PKCS1-v1_5', hash: 'SHA-256' },
    ES256: { kty: 'EC', name: 'ECDSA', hash: 'SHA-256', namedCurve: 'P-256' },
    EdDSA: { kty: 'OKP' },
};
const FIELDS = ['issuer', 'audience', 'algorithms', 'keys', 'jwks_uri', 'name_claim', 'role_claim'];
const ISSUERS = 16;
const KEYS = 32;
const SECRET = 32;       // bytes, at least, of a shared secret
const RSA = 2048;        // bits, at least, of a modulus
const EARLY = 5;         // seconds that a clock may be behind the issuer's
const NAME = /^[!-~]{1,128}$/;
const OWN = 'vllm-fleet';   // the issuer that this fleet is itself
const LONGEST = 128;     // characters of what a holder is called
// What a name of few letters means: this host, or another container.
const NEAR = /^http:\/\/(localhost|127\.[0-9.]+|\[::1\]|[a-z0-9_-]+)(:\d+)?\//;

function must(condition, what) {
    if (!condition) {
        throw Error(what);
    }
}

function text(value) {
    return typeof value === 'string' && value.length > 0;
}

function bytes(part) {
    return Buffer.from(part, 'base64url');
}

// The key for checking that a JWK holds, without what is not needed for it; an Error says what is wrong.
function publicPart(jwk, where) {
    must(jwk && typeof jwk === 'object', `${where} is no object`);
    const kept = { kty: jwk.kty };
    for (const name of ['kid', 'alg']) {
        if (jwk[name] !== undefined) {
            must(text(jwk[name]), `${where}: its "${name}" is no text`);
            kept[name] = jwk[name];
        }
    }
    if (jwk.until !== undefined && jwk.until !== null) {
        must(Number.isSafeInteger(jwk.until), `${where}: its "until" is no whole number of seconds`);
        kept.until = jwk.until;
    }
    const take = (...names) => names.forEach((name) => {
        must(text(jwk[name]), `${where}: its "${name}" is missing`);
        kept[name] = jwk[name];
    });
    switch (jwk.kty) {
    case 'oct':
        take('k');
        must(bytes(jwk.k).length >= SECRET, `${where}: its secret is shorter than ${SECRET} bytes`);
        break;
    case 'RSA':
        take('n', 'e');
        must(bytes(jwk.n).length * 8 >= RSA, `${where}: its modulus is shorter than ${RSA} bits`);
        break;
    case 'EC':
        take('crv', 'x', 'y');
        must(jwk.crv === 'P-256', `${where}: its curve is not P-256`);
        break;
    case 'OKP':
        take('crv', 'x');
        must(jwk.crv === 'Ed25519', `${where}: its curve is not Ed25519`);
        break;
    default:
        must(false, `${where}: its "kty" is none of oct, RSA, EC, OKP`);
    }
    return kept;
}

// The issuers that the text of tokens.json names.
function parse(content) {
    const file = JSON.parse(content);
    must(file && file.version === 1 && Array.isArray(file.issuers), 'it is not {"version": 1, "issuers": [...]}');
    const more = Object.keys(file).filter((name) => !['version', 'issuers'].includes(name));
    must(!more.length, `it has an unknown field: ${more.join(', ').slice(0, 100)}`);
    must(file.issuers.length <= ISSUERS, `it has more than ${ISSUERS} issuers`);
    const names = new Set();
    return file.issuers.map((issuer, i) => {
        const where = `issuer ${i + 1}`;
        must(issuer && typeof issuer === 'object', `${where} is no object`);
        const unknown = Object.keys(issuer).filter((name) => !FIELDS.includes(name));
        must(!unknown.length, `${where} has an unknown field: ${unknown.join(', ').slice(0, 100)}`);
        must(text(issuer.issuer) && !names.has(issuer.issuer), `${where}: its name is missing or there twice`);
        names.add(issuer.issuer);
        must(text(issuer.audience), `${where}: its "audience" is missing`);
        must(Array.isArray(issuer.algorithms) && issuer.algorithms.length, `${where}: its "algorithms" are missing`);
        issuer.algorithms.forEach((name) => must(Object.hasOwn(ALGORITHMS, name),
            `${where}: ${String(name).slice(0, 20)} is none of ${Object.keys(ALGORITHMS).join(', ')}`));
        const uri = issuer.jwks_uri || null;
        must(uri === null || text(uri) && (uri.startsWith('https://') || NEAR.test(uri)),
            `${where}: its "jwks_uri" is no https address`);
        // Who may read the address could else sign.
        must(uri === null || !issuer.algorithms.includes('HS256'), `${where}: HS256 has a secret, and none comes from an address`);
        const keys = (issuer.keys || []).map((jwk, n) => publicPart(jwk, `${where}, key ${n + 1}`));
        must(keys.length <= KEYS && (keys.length || uri), `${where} has no key, or more than ${KEYS}`);
        return {
            issuer: issuer.issuer, audience: issuer.audience, algorithms: issuer.algorithms, keys, jwks_uri: uri,
            name_claim: issuer.name_claim || 'sub', role_claim: issuer.role_claim || 'role',
        };
    });
}

// The keys in the text of a JWKS: those that could be used here. Other kinds are passed over.
function keySet(content) {
    const { keys } = JSON.parse(content);
    must(Array.isArray(keys), 'it has no "keys"');
    const found = [];
    for (const jwk of keys.slice(0, KEYS)) {
        try {
            if (jwk.kty !== 'oct' && (jwk.use === undefined || jwk.use === 'sig')) {
                found.push(publicPart(jwk, ''));
            }
        } catch (e) {
            // of another kind
        }
    }
    must(found.length, 'it has no key that is of use here');
    return found;
}

// Takes as long wherever they differ.
function same(one, other) {
    let differ = one.length ^ other.length;
    for (let i = 0; i < one.length && i < other.length; i++) {
        differ |= one.charCodeAt(i) ^ other.charCodeAt(i);
    }
    return differ === 0;
}

async function signed(algorithm, jwk, said, signature) {
    if (jwk.kty === 'oct') {
        return same(hashes.createHmac('sha256', bytes(jwk.k)).update(said).digest('base64url'), signature);
    }
    if (jwk.kty === 'OKP') {
        return ed25519.verify(bytes(jwk.x), bytes(signature), Buffer.from(said));
    }
    const { kid, alg, until, ...bare } = jwk;
    const how = ALGORITHMS[algorithm];
    const key = await crypto.subtle.importKey('jwk', bare, how, false, ['verify']);
    return crypto.subtle.verify(how, key, bytes(signature), Buffer.from(said));
}

function json(part) {
    const value = JSON.parse(String(bytes(part)));
    must(value && typeof value === 'object', '');
    return value;
}

// The role that a claim names; a token that says nothing of roles is a user's.
function roleOf(claim) {
    const roles = claim === undefined ? ['user'] : [].concat(claim);
    return ['admin', 'user'].find((role) => roles.includes(role));
}

// What a token's holder is called in counts and logs: `user:NAME`, or `ISSUER#NAME` of another issuer. No key can be called so, nor
// another issuer's user: what neither a name nor an address needs is escaped, `/` as well, which stands before an end user.
function called(issuer, name) {
    const plain = (text) => encodeURIComponent(text).replace(/%40/g, '@');
    const whole = issuer === OWN ? `user:${plain(name)}` : `${plain(issuer.replace(/^https:\/\//, '')).replace(/%2F/g, ':')}#${plain(name)}`;
    return whole.length <= LONGEST ? whole
        : `${whole.slice(0, 100)}=${hashes.createHash('sha256').update(whole).digest('hex').slice(0, 24)}`;
}

async function check(token, issuers, now) {
    const [head, body, signature] = token.split('.');
    const { alg, kid, crit } = json(head);
    const claims = json(body);
    const issuer = issuers.find((one) => one.issuer === claims.iss);
    must(issuer && crit === undefined && issuer.algorithms.includes(alg), '');
    must([].concat(claims.aud).includes(issuer.audience), '');
    const keys = issuer.keys.filter((jwk) => jwk.kty === ALGORITHMS[alg].kty && (jwk.alg === undefined || jwk.alg === alg)
        && (jwk.until === undefined || now < jwk.until) && (kid === undefined || jwk.kid === kid));
    if (!keys.length && issuer.jwks_uri) {
        return { unknown: issuer.jwks_uri };
    }
    must(keys.length === 1 && await signed(alg, keys[0], `${head}.${body}`, signature), '');
    must(Number.isFinite(claims.exp) && (claims.nbf === undefined || claims.nbf <= now + EARLY), '');
    if (now >= claims.exp) {
        return { expired: true };
    }
    const name = claims[issuer.name_claim];
    must(text(name) && NAME.test(name), '');
    return { name: called(issuer.issuer, name), role: roleOf(claims[issuer.role_claim]), until: claims.exp };
}

// Whose token this is: {name, role, until}; {expired} if it was; {unknown: address} if its key may have come since to that address;
// else {}. `now` is in seconds.
async function verify(token, issuers, now) {
    try {
        return await check(token, issuers, now);
    } catch (e) {
        return {};
    }
}

export default { parse, keySet, verify };
