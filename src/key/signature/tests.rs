use hex_literal::hex;
use proptest::prelude::*;
use ring::signature::KeyPair as _;

use super::vectors::{CREDENTIAL, DIRECT, ROTATION, ROTATION_TWICE, SIGNED, node};
use super::*;

fn pair(octet: u8) -> Ed25519KeyPair {
    Ed25519KeyPair::from_seed_unchecked(&[octet; 32]).unwrap()
}

fn public(octet: u8) -> LockPublic {
    LockPublic::from_bytes(pair(octet).public_key().as_ref().try_into().unwrap())
}

#[test]
fn signatures_of_every_kind_are_read_and_written_as_go_does() {
    for vector in [DIRECT, ROTATION, ROTATION_TWICE, CREDENTIAL, SIGNED] {
        assert_eq!(NodeKeySignature::decode(vector).unwrap().encode(), vector);
    }
}

#[test]
fn a_direct_signature_vouches_for_its_node_alone() {
    let direct = NodeKeySignature::decode(DIRECT).unwrap();
    let authorised = direct.authorises(&node(0x11)).unwrap();
    assert_eq!(authorised, Authorised { rotation: false, previous: Vec::new(), rotated_by: Some(public(3)) });
    assert_eq!(direct.authorises(&node(0x22)), Err(SignatureError::OtherKey));
}

#[test]
fn a_chain_of_rotations_names_what_it_replaced() {
    let twice = NodeKeySignature::decode(ROTATION_TWICE).unwrap().authorises(&node(0x33)).unwrap();
    assert_eq!(twice.previous, [node(0x22), node(0x11)]);
    let by_credential = NodeKeySignature::decode(SIGNED).unwrap().authorises(&node(0x11)).unwrap();
    assert_eq!((by_credential.previous, by_credential.rotated_by), (Vec::new(), None));
}

#[test]
fn a_rotation_is_signed_as_go_does() {
    let direct = NodeKeySignature::decode(DIRECT).unwrap();
    let rotation = direct.clone().rotated(&node(0x22), &pair(3)).unwrap();
    assert_eq!(hex::encode(rotation.encode()), hex::encode(ROTATION));
    assert_eq!(rotation.rotated(&node(0x33), &pair(3)).unwrap().encode(), ROTATION_TWICE);
    assert_eq!(direct.clone().rotated(&node(0x11), &pair(3)).unwrap(), direct);
}

#[test]
fn a_rotation_by_another_key_is_forged() {
    let rotation = NodeKeySignature::decode(DIRECT).unwrap().rotated(&node(0x22), &pair(4)).unwrap();
    assert_eq!(rotation.authorises(&node(0x22)), Err(SignatureError::Forged));
}

#[test]
fn a_credential_vouches_for_no_node() {
    let credential = NodeKeySignature::decode(CREDENTIAL).unwrap();
    assert_eq!(credential.authorises(&node(0x11)), Err(SignatureError::Fields));
    assert_eq!(credential.verify_root(), Ok(()));
}

#[test]
fn a_chain_ends_at_sixteen_levels() {
    let mut chain = NodeKeySignature::decode(DIRECT).unwrap();
    for octet in 1..16 {
        chain = chain.rotated(&node(octet), &pair(3)).unwrap();
    }
    assert_eq!(NodeKeySignature::decode(&chain.encode()).unwrap().authorises(&node(15)).unwrap().previous.len(), 15);
    assert_eq!(chain.rotated(&node(16), &pair(3)), Err(SignatureError::TooLarge));
    let deep: Vec<u8> = [0xa1, 5].repeat(40);
    assert_eq!(NodeKeySignature::decode(&deep), Err(SignatureError::TooLarge));
}

#[test]
fn what_is_not_canonical_is_garbled() {
    let garbled = [
        &hex!("a2 01 01 01 01")[..],
        &hex!("bf 01 01 ff"),
        &hex!("a2 01 01 02 5f 41 00 ff"),
        &hex!("a1 01 01 00"),
        &hex!("a1 01 01 a0"),
        &[],
    ];
    for bytes in garbled {
        assert_eq!(NodeKeySignature::decode(bytes), Err(SignatureError::Garbled), "{}", hex::encode(bytes));
    }
    assert_eq!(NodeKeySignature::decode(&hex!("a2 01 01 07 41 00")), Err(SignatureError::Fields));
    assert_eq!(NodeKeySignature::decode(&hex!("a1 01 09")), Err(SignatureError::Fields));
}

proptest! {
    #[test]
    fn any_bytes_are_a_signature_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = NodeKeySignature::decode(&bytes).map(|read| read.authorises(&node(0x11)));
    }

    #[test]
    fn a_changed_octet_never_vouches(at in 0..ROTATION_TWICE.len(), flip in 1..=255u8) {
        let mut changed = ROTATION_TWICE.to_vec();
        changed[at] ^= flip;
        let vouches = NodeKeySignature::decode(&changed).and_then(|read| read.authorises(&node(0x33)));
        prop_assert!(vouches.is_err());
    }

    #[test]
    fn encode_then_decode_is_identity(
        kind in 0..3usize,
        fields in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..80), 4),
        nests in any::<bool>(),
    ) {
        let kind = [SignatureKind::Direct, SignatureKind::Rotation, SignatureKind::Credential][kind];
        let [node, signer, signature, wrapping] = fields.try_into().unwrap();
        let nested = nests.then(|| Box::new(NodeKeySignature::decode(DIRECT).unwrap()));
        let made = NodeKeySignature { kind, node, signer, signature, nested, wrapping };
        prop_assert_eq!(NodeKeySignature::decode(&made.encode()).unwrap(), made);
    }
}
