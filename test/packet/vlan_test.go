package packet

import (
	"fmt"
	"testing"

	"fairlead/bpf"

	"github.com/gopacket/gopacket/layers"
)

const (
	dot1Q  = uint16(layers.EthernetTypeDot1Q)
	dot1AD = uint16(layers.EthernetTypeQinQ)
	tagAD  = uint16(bpf.FairleadTagTAG_8021AD)
)

// tagging is how a client's frames are tagged, and how they are when they come back: a priority is no VLAN and is not
// kept.
type tagging struct {
	name string
	in   []tag
	back []tag
}

var taggings = []tagging{
	{"none", nil, nil},
	{"one", []tag{{dot1Q, 5}}, []tag{{dot1Q, 5}}},
	{"one, the last VLAN", []tag{{dot1Q, 0xfff}}, []tag{{dot1Q, 0xfff}}},
	{"one, with a priority", []tag{{dot1Q, 0xf005}}, []tag{{dot1Q, 5}}},
	{"one of 802.1ad", []tag{{dot1AD, 5}}, []tag{{dot1AD, 5}}},
	{"two of 802.1ad and 802.1Q", []tag{{dot1AD, 0x6007}, {dot1Q, 0x2005}}, []tag{{dot1AD, 7}, {dot1Q, 5}}},
	{"two of 802.1Q", []tag{{dot1Q, 7}, {dot1Q, 5}}, []tag{{dot1Q, 7}, {dot1Q, 5}}},
	{"two of 802.1ad", []tag{{dot1AD, 7}, {dot1AD, 5}}, []tag{{dot1AD, 7}, {dot1AD, 5}}},
	{"a priority alone", []tag{{dot1Q, 0xa000}}, nil},
	{"a priority, then a VLAN", []tag{{dot1Q, 0xa000}, {dot1Q, 5}}, []tag{{dot1Q, 5}}},
	{"a VLAN, then a priority", []tag{{dot1AD, 5}, {dot1Q, 0xa000}}, []tag{{dot1AD, 5}}},
	{"two priorities", []tag{{dot1AD, 0xe000}, {dot1Q, 0xa000}}, nil},
}

// hopTags are those of the ways to backends.
var hopTags = [][2]uint16{{}, {9}, {0xfff}, {tagAD | 9}, {tagAD | 9, 11}, {9, 11}, {tagAD | 9, tagAD | 11}}

// tagged gives a connection's frames tags.
func (c *conversation) tagged(by tagging) *conversation {
	c.tags, c.vlan = by.in, by.back
	return c
}

// Frames leave with the tags of their way, whatever tags they came with: none to two in, none to two out, and replies
// with those that their client's frames came with.
func TestTags(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		eachProtocol(t, plan{backends: 2, twoArms: true}, func(t *testing.T, p plan) {
			for _, p.tags = range hopTags {
				t.Run(fmt.Sprintf("out %#x", p.tags), func(t *testing.T) { testTags(t, f, method, p) })
			}
		})
	})
}

func testTags(t *testing.T, f family, method bpf.FairleadMethod, p plan) {
	s := newScene(t, f, method, p)
	settled := s.newClient().open()
	s.rebuildExceptions()
	for _, in := range taggings {
		t.Run("in "+in.name, func(t *testing.T) {
			s.in(t)
			// As short as frames get, and padded.
			settled.tagged(in)
			bare := settled.segment(ack, "")
			bare.options, bare.padding = nil, []byte("\xff\xfe\xfd")
			settled.send(bare, settled.settledVerdict())
			c := s.newClient().tagged(in)
			c.send(c.segment(syn, ""), forwardNew)
			if rewrites(method) {
				c.finishOpening()
				c.talks()
			}
		})
		s.in(t)
	}
}

// Replies follow the client to another VLAN.
func TestTagsFollowClient(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		for _, method := range []bpf.FairleadMethod{fullnat, nat} {
			s := newScene(t, f, method, plan{tags: [2]uint16{9}})
			c := s.newClient()
			c.send(c.segment(syn, ""), forwardNew)
			c.finishOpening()
			for _, in := range taggings {
				c.tagged(in)
				c.send(c.segment(ack, "here"), forwardTable)
				c.reply(c.answer(ack, "there"), replyTable)
			}
			// A stranger's packets from another VLAN move nothing.
			c.tagged(taggings[0])
			c.send(c.segment(ack, "here"), forwardTable)
			stranger := c.segment(ack, "").atSequence(c.seq + 1<<30).tagged(tag{dot1Q, 666})
			c.send(stranger, forwardTable)
			c.reply(c.answer(ack, "there"), replyTable)
		}
	})
}

// Our own answers, RST and ICMP, go back with the very tags of the frame they answer: priorities too.
func TestTagsOfAnswers(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		eachProtocol(t, plan{}, func(t *testing.T, p plan) {
			s := newScene(t, f, fullnat, plan{udp: p.udp, mtu: 1500, tags: [2]uint16{tagAD | 9, 11},
				settings: []setting{constant("answers_a_tick", uint32(1000))}})
			open := s.newClient().open()
			s.service.flags |= bpf.FairleadServiceFlagSERVICE_LEAVING
			s.setService(s.service)
			for _, in := range taggings {
				t.Run(fmt.Sprintf("udp=%t/%s", p.udp, in.name), func(t *testing.T) {
					s.in(t)
					c := s.newClient().tagged(in)
					c.send(c.segment(syn, ""), resetLeaving)
					if !p.udp {
						lost := c.segment(ack, "")
						c.send(lost, resetUnknown)
						// Frames about Ethernet's least.
						lost.options = nil
						for padding := range 12 {
							lost.padding = []byte("\xa5\xa5\xa5\xa5\xa5\xa5\xa5\xa5\xa5\xa5\xa5\xa5")[:padding]
							c.send(lost, resetUnknown)
						}
					}
					open.tagged(in)
					open.tooBigFor = 1500
					open.send(open.long(1501), answerTooBig)
				})
				s.in(t)
			}
		})
	})
}

// With more than two tags, or with none behind the last, a frame is not looked into.
func TestTagsTooMany(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, fullnat, plan{})
		c := s.newClient().open()
		data := c.segment(ack, "deep inside")
		for _, tags := range [][]tag{
			{{dot1Q, 5}, {dot1Q, 6}, {dot1Q, 7}},
			{{dot1AD, 5}, {dot1AD, 6}, {dot1Q, 0}},
			{{0x9100, 5}}, // of before 802.1ad
		} {
			c.send(data.tagged(tags...), passNotOurs)
		}
		for _, tags := range [][]tag{{{dot1Q, 5}}, {{dot1AD, 5}, {dot1Q, 6}}} {
			frame := data.tagged(tags...).bytes()
			for n := ethernetHeader; n <= ethernetHeader+4*len(tags); n++ {
				c.sendRaw(data, frame[:n], passNotOurs)
			}
		}
		c.send(data, forwardTable)
	})
}
