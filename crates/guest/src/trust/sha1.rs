//! SHA-1 (RFC 3174), with which Java's stores are closed. It protects nothing there: its key is public.

/// The hash of `parts`, one after the other.
pub(super) fn sha1(parts: &[&[u8]]) -> [u8; 20] {
    let mut message = parts.concat();
    let bits = (message.len() as u64).wrapping_mul(8);
    message.push(0x80);
    while message.len() % 64 != 56 {
        message.push(0);
    }
    message.extend(bits.to_be_bytes());
    let mut state: [u32; 5] = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476, 0xc3d2_e1f0];
    let (blocks, _) = message.as_chunks::<64>();
    for block in blocks {
        let mut words = [0_u32; 80];
        let (first, _) = block.as_chunks::<4>();
        for (word, bytes) in words.iter_mut().zip(first) {
            *word = u32::from_be_bytes(*bytes);
        }
        for at in 16..80 {
            words[at] = (words[at - 3] ^ words[at - 8] ^ words[at - 14] ^ words[at - 16]).rotate_left(1);
        }
        let [mut a, mut b, mut c, mut d, mut e] = state;
        for (at, word) in words.iter().enumerate() {
            let (mix, constant) = match at {
                0..20 => ((b & c) | (!b & d), 0x5a82_7999),
                20..40 => (b ^ c ^ d, 0x6ed9_eba1),
                40..60 => ((b & c) | (b & d) | (c & d), 0x8f1b_bcdc),
                _ => (b ^ c ^ d, 0xca62_c1d6_u32),
            };
            let sum = a.rotate_left(5).wrapping_add(mix).wrapping_add(e).wrapping_add(constant);
            (e, d, c, b, a) = (d, c, b.rotate_left(30), a, sum.wrapping_add(*word));
        }
        for (value, more) in state.iter_mut().zip([a, b, c, d, e]) {
            *value = value.wrapping_add(more);
        }
    }
    let mut hash = [0; 20];
    let (places, _) = hash.as_chunks_mut::<4>();
    for (place, value) in places.iter_mut().zip(state) {
        *place = value.to_be_bytes();
    }
    hash
}

#[cfg(test)]
mod tests {
    use super::sha1;

    #[test]
    fn the_examples_of_rfc_3174() {
        let hex = |parts: &[&[u8]]| sha1(parts).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!(hex(&[b"a", b"bc"]), "a9993e364706816aba3e25717850c26c9cd0d89d");
        assert_eq!(hex(&[]), "da39a3ee5e6b4b0d3255bfef95601890afd80709");
        let long = vec![b'a'; 1_000_000];
        assert_eq!(hex(&[&long]), "34aa973cd4c4daa4f61eeb2bdbad27316534016f");
        let tens = b"0123456701234567012345670123456701234567012345670123456701234567".repeat(10);
        assert_eq!(hex(&[&tens]), "dea356a2cddd90c7a7ecedc5ebb563934f460452");
    }
}
