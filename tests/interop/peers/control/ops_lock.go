package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"

	"tailscale.com/tailcfg"
	"tailscale.com/tka"
	"tailscale.com/types/key"
	"tailscale.com/types/tkatype"
)

// lock is the tailnet lock's one trusted key, once there is one.
type lock struct {
	private ed25519.PrivateKey
}

func init() {
	operations["lock"] = does(startLock)
	operations["lock_sign"] = does(lockSign)
	operations["lock_wrap"] = does(lockWrap)
}

// SignAUM implements tka.Signer.
func (l *lock) SignAUM(digest tkatype.AUMSigHash) ([]tkatype.Signature, error) {
	return []tkatype.Signature{{KeyID: l.id(), Signature: ed25519.Sign(l.private, digest[:])}}, nil
}

func (l *lock) id() tkatype.KeyID {
	return tkatype.KeyID(l.private.Public().(ed25519.PublicKey))
}

func (l *lock) sign(s *tka.NodeKeySignature) tkatype.MarshaledSignature {
	s.KeyID = l.id()
	digest := s.SigHash()
	s.Signature = ed25519.Sign(l.private, digest[:])
	return s.Serialize()
}

// startLock switches the tailnet lock on, with a key of its own that signs the named nodes.
func startLock(b *bed, a struct {
	Sign []string `json:"sign"`
}) (any, error) {
	if b.lock != nil {
		return nil, errors.New("the lock is on already")
	}
	_, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		return nil, err
	}
	l := &lock{private: private}
	_, genesis, err := tka.Create(tka.ChonkMem(), tka.State{
		Keys:              []tka.Key{{Kind: tka.Key25519, Public: l.id(), Votes: 1}},
		DisablementValues: [][]byte{tka.DisablementKDF([]byte("tbcontrol"))},
	}, l)
	if err != nil {
		return nil, err
	}
	b.lock = l
	for _, ref := range a.Sign {
		if _, err := lockSign(b, nodeArg{Node: ref}); err != nil {
			return nil, err
		}
	}
	request := tailcfg.TKAInitBeginRequest{Version: tailcfg.CurrentCapabilityVersion, GenesisAUM: genesis.Serialize()}
	if err := b.askControl("/machine/tka/init/begin", request); err != nil {
		return nil, err
	}
	b.wake()
	return nil, nil
}

// lockSign signs a node's key.
func lockSign(b *bed, a nodeArg) (any, error) {
	if b.lock == nil {
		return nil, errors.New("the lock is off")
	}
	n, err := b.node(a.Node)
	if err != nil {
		return nil, err
	}
	public, err := n.Key.MarshalBinary()
	if err != nil {
		return nil, err
	}
	n.KeySignature = b.lock.sign(&tka.NodeKeySignature{SigKind: tka.SigDirect, Pubkey: public})
	b.control.UpdateNode(n)
	return nil, nil
}

// lockWrap adds to an auth key what lets its node sign itself, as `tailscale lock sign` does.
func lockWrap(b *bed, a struct {
	Key string `json:"key"`
}) (any, error) {
	if b.lock == nil {
		return nil, errors.New("the lock is off")
	}
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		return nil, err
	}
	credential := b.lock.sign(&tka.NodeKeySignature{SigKind: tka.SigCredential, WrappingPubkey: public})
	text := base64.RawStdEncoding
	return fmt.Sprintf("%s--TL%s-%s", a.Key, text.EncodeToString(credential), text.EncodeToString(private)), nil
}

// keepSignature stores the signature that a node registered with, which testcontrol forgets.
func (f *front) keepSignature(request *tailcfg.RegisterRequest) {
	if len(request.NodeKeySignature) == 0 {
		return
	}
	if n := f.control.Node(request.NodeKey); n != nil {
		n.KeySignature = request.NodeKeySignature
		f.control.UpdateNode(n)
	}
}

// askControl does a request as a machine that nobody else is.
func (b *bed) askControl(path string, body any) error {
	text, err := json.Marshal(body)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), waitLimit(0))
	defer cancel()
	client, err := b.front.upstream.dial(ctx, key.NewMachine(), uint16(tailcfg.CurrentCapabilityVersion))
	if err != nil {
		return err
	}
	defer client.Close()
	request, err := http.NewRequestWithContext(ctx, "GET", "https://testcontrol"+path, bytes.NewReader(text))
	if err != nil {
		return err
	}
	answer, err := client.RoundTrip(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		said, _ := io.ReadAll(io.LimitReader(answer.Body, 1000))
		return fmt.Errorf("%s: %s: %s", path, answer.Status, said)
	}
	return nil
}
