// Checks signatures of Ed25519 (RFC 8032, section 5.1), which WebCrypto in njs does not know.
//
// Nothing here is secret, so nothing has to take the same time. One check costs a worker some milliseconds.

const P = 2n ** 255n - 19n;
// The order of the group that B makes.
const L = 2n ** 252n + 27742317777372353535851937790883648493n;
const D = mod(-121665n * power(121666n, P - 2n));
const ROOT = power(2n, (P - 1n) / 4n);
const ZERO = [0n, 1n, 1n, 0n];
const B = point(mod(4n * power(5n, P - 2n)), 0n);

function mod(a) {
    const rest = a % P;
    return rest < 0n ? rest + P : rest;
}

function power(base, exponent) {
    let result = 1n;
    for (let b = base, e = exponent; e > 0n; e >>= 1n) {
        if (e & 1n) {
            result = result * b % P;
        }
        b = b * b % P;
    }
    return result;
}

// A number of bytes, the lowest first.
function number(bytes) {
    return BigInt('0x' + Buffer.from(bytes).reverse().toString('hex'));
}

// The point of this y whose x has this lowest bit, as [X, Y, Z, T] with x = X/Z, y = Y/Z, xy = T/Z; null if there is none.
function point(y, sign) {
    if (y >= P) {
        return null;
    }
    const u = mod(y * y - 1n);
    const v = mod(D * y * y + 1n);
    const v3 = v * v * v % P;
    let x = u * v3 % P * power(u * v3 % P * v3 % P * v % P, (P - 5n) / 8n) % P;
    const square = v * x % P * x % P;
    if (square !== u) {
        if (square !== mod(-u)) {
            return null;
        }
        x = x * ROOT % P;
    }
    if (x === 0n && sign) {
        return null;
    }
    if ((x & 1n) !== sign) {
        x = mod(-x);
    }
    return [x, y, 1n, x * y % P];
}

function decode(bytes) {
    const all = number(bytes);
    return point(all & (1n << 255n) - 1n, all >> 255n);
}

function add([x1, y1, z1, t1], [x2, y2, z2, t2]) {
    const a = (y1 - x1) * (y2 - x2) % P;
    const b = (y1 + x1) * (y2 + x2) % P;
    const c = 2n * t1 * t2 % P * D % P;
    const d = 2n * z1 * z2 % P;
    const e = b - a, f = d - c, g = d + c, h = b + a;
    return [e * f % P, g * h % P, f * g % P, e * h % P];
}

function double([x, y, z]) {
    const a = x * x % P;
    const b = y * y % P;
    const h = a + b;
    const e = h - (x + y) * (x + y) % P;
    const g = a - b;
    const f = 2n * z * z % P + g;
    return [e * f % P, g * h % P, f * g % P, e * h % P];
}

// one·p + other·q, by the bits of both at once
function sum(one, p, other, q) {
    const both = add(p, q);
    let result = ZERO;
    for (let bit = 255n; bit >= 0n; bit--) {
        result = double(result);
        const first = one >> bit & 1n, second = other >> bit & 1n;
        if (first || second) {
            result = add(result, first && second ? both : first ? p : q);
        }
    }
    return result;
}

// Whether a signature (64 bytes) of a message is by the key whose public half is `key` (32 bytes). A promise of true or false.
async function verify(key, signature, message) {
    if (key.length !== 32 || signature.length !== 64) {
        return false;
    }
    const r = signature.slice(0, 32);
    const s = number(signature.slice(32));
    const a = decode(key);
    const wanted = decode(r);
    // A larger one would be a second signature of the same message.
    if (a === null || wanted === null || s >= L) {
        return false;
    }
    const digest = await crypto.subtle.digest('SHA-512', Buffer.concat([r, key, message]));
    const h = number(Buffer.from(digest)) % L;
    const minus = [mod(-a[0]), a[1], a[2], mod(-a[3])];
    const [x, y, z] = sum(s, B, h, minus);
    return mod(x * wanted[2] - wanted[0] * z) === 0n && mod(y * wanted[2] - wanted[1] * z) === 0n;
}

export default { verify };
