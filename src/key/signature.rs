//! Node-key signatures of the tailnet lock: who vouches for a node key, and by which chain.
//!
//! A signature is a map of CBOR in CTAP2's canonical form, whose digest without its own field 4 is what was signed. A
//! direct one names the trusted key that signed it; a rotation nests the one that it follows and is signed by the key
//! that that one names; a credential lets a key that travels with an auth key make a rotation.
//! Whether the named key is trusted by the tailnet is not decided here. Source: Tailscale, tka/sig.go.

use blake2::digest::consts::U32;
use blake2::{Blake2s, Digest};
use minicbor::data::Type;
use minicbor::encode::write::{Cursor, EndOfSlice};
use minicbor::{Decoder, Encoder};
use ring::signature::{ED25519, Ed25519KeyPair, UnparsedPublicKey};

use super::{LockPublic, NodePublic};

/// What a node key begins with inside a signature. Source: Tailscale, types/key, `nodePublicBinaryPrefix`.
const NODE_PREFIX: &[u8; 2] = b"np";
/// How deeply signatures may nest. Source: Tailscale, tka, `cborDecOpts`.
const NESTED_MAX: usize = 16;
/// The most octets of a signature: sixteen levels of less than 256 octets each.
const LENGTH_MAX: usize = 4096;

/// Why a signature does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// It is no signature in CBOR.
    #[error("not a node-key signature")]
    Garbled,
    /// More than 16 levels, or more than 4,096 octets.
    #[error("the signature nests deeper, or is longer, than any may")]
    TooLarge,
    /// A kind, or a set of fields, that no signature has.
    #[error("the signature's fields do not fit its kind")]
    Fields,
    /// It is for another node key.
    #[error("the signature is for another node key")]
    OtherKey,
    /// It was not made by the key that it names.
    #[error("the signature was not made by the key that it names")]
    Forged,
}

/// What a signature is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignatureKind {
    /// A node key, signed by a trusted key.
    Direct,
    /// A node key that follows another, or that a credential admits.
    Rotation,
    /// A key that may sign a rotation, signed by a trusted key.
    Credential,
}

/// A signature. Source: Tailscale, tka, `NodeKeySignature`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeKeySignature {
    kind: SignatureKind,
    /// `np` and a node key; empty for a credential.
    node: Vec<u8>,
    /// The trusted key; empty for a rotation.
    signer: Vec<u8>,
    signature: Vec<u8>,
    nested: Option<Box<NodeKeySignature>>,
    /// The key that signs a rotation which nests this.
    wrapping: Vec<u8>,
}

/// What a valid signature says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Authorised {
    /// Whether the key follows another, or came by a credential.
    pub rotation: bool,
    /// Node keys that were rotated out.
    pub previous: Vec<NodePublic>,
    /// For a chain that a direct signature began: the key that signs its rotations. Only one node may have it.
    pub rotated_by: Option<LockPublic>,
}

impl NodeKeySignature {
    /// Reads a signature.
    ///
    /// # Errors
    /// [`SignatureError::Garbled`], [`SignatureError::TooLarge`] and [`SignatureError::Fields`].
    pub fn decode(bytes: &[u8]) -> Result<Self, SignatureError> {
        if bytes.len() > LENGTH_MAX {
            return Err(SignatureError::TooLarge);
        }
        let mut decoder = Decoder::new(bytes);
        let signature = Self::read(&mut decoder, 1)?;
        if decoder.position() == bytes.len() { Ok(signature) } else { Err(SignatureError::Garbled) }
    }

    fn read(decoder: &mut Decoder<'_>, level: usize) -> Result<Self, SignatureError> {
        if level > NESTED_MAX {
            return Err(SignatureError::TooLarge);
        }
        let fields = decoder.map().ok().flatten().ok_or(SignatureError::Garbled)?;
        let (mut kind, mut last) = (0, 0);
        let mut read = Self {
            kind: SignatureKind::Direct,
            node: Vec::new(),
            signer: Vec::new(),
            signature: Vec::new(),
            nested: None,
            wrapping: Vec::new(),
        };
        for _ in 0..fields {
            let field = decoder.u8().map_err(|_| SignatureError::Garbled)?;
            // Keys go up in the canonical form; so none comes twice.
            if field <= last {
                return Err(SignatureError::Garbled);
            }
            last = field;
            match field {
                1 => kind = decoder.u8().map_err(|_| SignatureError::Garbled)?,
                2 => read.node = octets(decoder)?,
                3 => read.signer = octets(decoder)?,
                4 => read.signature = octets(decoder)?,
                5 => read.nested = Some(Box::new(Self::read(decoder, level + 1)?)),
                6 => read.wrapping = octets(decoder)?,
                _ => return Err(SignatureError::Fields),
            }
        }
        read.kind = match kind {
            1 => SignatureKind::Direct,
            2 => SignatureKind::Rotation,
            3 => SignatureKind::Credential,
            _ => return Err(SignatureError::Fields),
        };
        Ok(read)
    }

    /// The signature in its one canonical form.
    pub fn encode(&self) -> Vec<u8> {
        self.write(true)
    }

    fn write(&self, signed: bool) -> Vec<u8> {
        let mut room = vec![0; self.length()];
        let mut encoder = Encoder::new(Cursor::new(&mut room[..]));
        self.write_to(&mut encoder, signed).expect("the buffer holds the longest form");
        let length = encoder.writer().position();
        room.truncate(length);
        room
    }

    /// No fewer octets than its form has: each field costs six besides its contents at most.
    fn length(&self) -> usize {
        let own = [&self.node, &self.signer, &self.signature, &self.wrapping];
        let own: usize = own.iter().map(|field| field.len() + 6).sum();
        own + 6 + self.nested.as_ref().map_or(0, |nested| nested.length())
    }

    fn write_to(
        &self,
        encoder: &mut Encoder<Cursor<&mut [u8]>>,
        signed: bool,
    ) -> Result<(), minicbor::encode::Error<EndOfSlice>> {
        let unsigned = Vec::new();
        let signature = if signed { &self.signature } else { &unsigned };
        let before = [(2, &self.node), (3, &self.signer), (4, signature)];
        let before: Vec<_> = before.into_iter().filter(|(_, octets)| !octets.is_empty()).collect();
        let wrapping = !self.wrapping.is_empty();
        let fields = 1 + before.len() + usize::from(self.nested.is_some()) + usize::from(wrapping);
        encoder.map(fields as u64)?.u8(1)?.u8(match self.kind {
            SignatureKind::Direct => 1,
            SignatureKind::Rotation => 2,
            SignatureKind::Credential => 3,
        })?;
        for (field, octets) in before {
            encoder.u8(field)?.bytes(octets)?;
        }
        if let Some(nested) = &self.nested {
            nested.write_to(encoder.u8(5)?, true)?;
        }
        if wrapping {
            encoder.u8(6)?.bytes(&self.wrapping)?;
        }
        Ok(())
    }

    /// What it is for.
    pub fn kind(&self) -> SignatureKind {
        self.kind
    }

    /// The digest that is signed.
    fn digest(&self) -> [u8; 32] {
        Blake2s::<U32>::digest(self.write(false)).into()
    }

    /// A signature of `node` by `pair`, which `self` has to name as its wrapping key: the rotation that a credential,
    /// or an older signature, allows. One that is for `node` already stays as it is.
    ///
    /// # Errors
    /// [`SignatureError::TooLarge`] when the chain is full; the caller then goes without.
    pub fn rotated(self, node: &NodePublic, pair: &Ed25519KeyPair) -> Result<Self, SignatureError> {
        let node = node_octets(node);
        if self.node == node {
            return Ok(self);
        }
        if self.depth() >= NESTED_MAX {
            return Err(SignatureError::TooLarge);
        }
        let mut rotation = Self {
            kind: SignatureKind::Rotation,
            node,
            signer: Vec::new(),
            signature: Vec::new(),
            nested: Some(Box::new(self)),
            wrapping: Vec::new(),
        };
        rotation.signature = pair.sign(&rotation.digest()).as_ref().to_vec();
        Ok(rotation)
    }

    fn depth(&self) -> usize {
        1 + self.nested.as_ref().map_or(0, |nested| nested.depth())
    }

    /// The key that has to sign what nests this one.
    pub fn wrapping_key(&self) -> Option<LockPublic> {
        if !self.wrapping.is_empty() {
            return lock_key(&self.wrapping).ok();
        }
        match self.kind {
            SignatureKind::Rotation => self.nested.as_ref()?.wrapping_key(),
            SignatureKind::Direct | SignatureKind::Credential => None,
        }
    }

    /// Whether it vouches for `node`, each link of its chain being signed by the key that the next one names.
    ///
    /// # Errors
    /// [`SignatureError`] when it does not.
    pub fn authorises(&self, node: &NodePublic) -> Result<Authorised, SignatureError> {
        if self.kind == SignatureKind::Credential {
            return Err(SignatureError::Fields);
        }
        if self.node != node_octets(node) {
            return Err(SignatureError::OtherKey);
        }
        let (mut link, mut previous) = (self, Vec::new());
        while link.kind == SignatureKind::Rotation {
            let nested = link.nested.as_deref().ok_or(SignatureError::Fields)?;
            let rotator = nested.wrapping_key().ok_or(SignatureError::Fields)?;
            link.check(&rotator)?;
            if nested.kind != SignatureKind::Credential {
                previous.push(node_key(&nested.node)?);
            }
            link = nested;
        }
        link.verify_root()?;
        let rotated_by = match link.kind {
            SignatureKind::Direct => link.wrapping_key(),
            SignatureKind::Rotation | SignatureKind::Credential => None,
        };
        Ok(Authorised { rotation: self.kind == SignatureKind::Rotation, previous, rotated_by })
    }

    /// Whether the direct signature or credential was made by the key that it names.
    pub(super) fn verify_root(&self) -> Result<(), SignatureError> {
        if self.nested.is_some() {
            return Err(SignatureError::Fields);
        }
        self.check(&lock_key(&self.signer)?)
    }

    fn check(&self, key: &LockPublic) -> Result<(), SignatureError> {
        let key = UnparsedPublicKey::new(&ED25519, key.as_bytes());
        key.verify(&self.digest(), &self.signature).map_err(|_| SignatureError::Forged)
    }
}

fn octets(decoder: &mut Decoder<'_>) -> Result<Vec<u8>, SignatureError> {
    // Indefinite lengths are another type; null is Go's empty slice.
    match decoder.datatype() {
        Ok(Type::Bytes) => Ok(decoder.bytes().map_err(|_| SignatureError::Garbled)?.to_vec()),
        Ok(Type::Null) => decoder.null().map(|()| Vec::new()).map_err(|_| SignatureError::Garbled),
        Ok(_) | Err(_) => Err(SignatureError::Garbled),
    }
}

fn node_octets(node: &NodePublic) -> Vec<u8> {
    [&NODE_PREFIX[..], node.as_bytes()].concat()
}

fn node_key(octets: &[u8]) -> Result<NodePublic, SignatureError> {
    let raw = octets.strip_prefix(NODE_PREFIX).and_then(|raw| raw.try_into().ok());
    raw.map(NodePublic::from_bytes).ok_or(SignatureError::Fields)
}

fn lock_key(octets: &[u8]) -> Result<LockPublic, SignatureError> {
    octets.try_into().map(LockPublic::from_bytes).map_err(|_| SignatureError::Fields)
}

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) mod vectors;
